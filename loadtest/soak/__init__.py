"""Soak test: many good and bad requests against one server, whose memory, descriptors and threads should not grow."""
