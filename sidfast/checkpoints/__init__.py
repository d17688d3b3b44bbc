"""Checkpoints: format, reading and choosing, saving in the background."""
