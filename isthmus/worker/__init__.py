"""What prefill and decode workers share. Reaches torch through the engine."""
