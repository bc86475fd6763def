"""The decode service: HTTP, scheduling, PNG, metrics."""
