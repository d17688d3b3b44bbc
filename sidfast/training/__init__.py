"""Engines, run directory, checkpoints, and the loop."""
