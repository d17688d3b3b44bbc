"""The toy teacher of the synthetic shapes dataset: how it is built and trained."""
