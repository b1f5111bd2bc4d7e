"""Every kernel against the ceilings of its machine, its peers, and its own best variant that is not exact."""
