"""What prefill and decode workers share. `engine_start` and `app` reach torch through the engine, the rest does not."""
