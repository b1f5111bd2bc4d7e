"""The cache as data: what a cached row looks like, which blocks exist, who holds them, what they hold. No torch."""
