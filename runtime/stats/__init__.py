"""Statistics and comparisons of samples."""
