"""Removing channels."""
