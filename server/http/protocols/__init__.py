"""Protocols of decode requests, one module each: where a protocol's requests arrive, their syntax and its responses."""
