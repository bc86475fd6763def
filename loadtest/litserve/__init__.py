"""Comparison with LitServe."""
