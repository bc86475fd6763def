"""Capacity planning by simulation."""
