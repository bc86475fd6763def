"""HTTP/1.1 connections: strict parsing, framing, time and byte limits. It knows nothing about decoding."""
