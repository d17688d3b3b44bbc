"""Sizes of images."""


def pair(size):
    """(height, width) of a size that is one number or both."""
    return (size, size) if isinstance(size, int) else tuple(size)
