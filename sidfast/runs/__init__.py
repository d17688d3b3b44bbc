"""The run directory: what a run writes, previews, evaluations and exports of it."""
