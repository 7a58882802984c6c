"""Samples that models are run on."""
