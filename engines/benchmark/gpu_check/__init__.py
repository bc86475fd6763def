"""Checks and measurements of a GPU, in one command."""
