"""Micro-benchmarks of the PNG encoder and of the HTTP path."""
