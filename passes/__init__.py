"""Rewrite passes: graph in, graph out, one idea per file."""
