"""Linear layers and affine maps: what they are in a graph."""
