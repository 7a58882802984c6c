"""Zeros in patterns."""
