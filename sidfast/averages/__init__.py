"""Weights that follow the generator: its exponential moving average, and copies of it as it was."""
