"""Scales and shifts of channels."""
