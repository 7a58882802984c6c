"""Exact folds."""
