"""Captions and the shapes world: everything that the trainer reads."""
