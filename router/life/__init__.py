"""One request's life in a router, from its admission to its last message, whatever its workers do meanwhile."""
