"""Scheduling as pure functions of time: no torch, no HTTP, no threads."""
