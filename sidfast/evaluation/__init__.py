"""Measures of a generator's images."""
