"""Loading and running the three networks."""
