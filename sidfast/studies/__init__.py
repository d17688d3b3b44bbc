"""Studies: what a change to a run does, over several seeds."""
