"""The decode service: HTTP, scheduling, image encoding, metrics."""
