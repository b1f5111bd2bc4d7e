"""What a model directory says: its files, configuration, architecture and tensor names. No torch."""
