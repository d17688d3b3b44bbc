"""From a folder of weights to a teacher: checks, loading, random initialisation."""
