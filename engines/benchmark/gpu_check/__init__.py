"""Correctness checks and performance measurements of a GPU, in one command."""
