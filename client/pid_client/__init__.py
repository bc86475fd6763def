"""Client of the PiD decode server."""
