"""The graph, its file and its weights."""
