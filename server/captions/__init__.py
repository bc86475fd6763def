"""Captions of requests with a prompt: cache and text encoder."""
