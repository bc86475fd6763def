"""Comparison of this server with LitServe."""
