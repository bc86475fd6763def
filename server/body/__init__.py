"""Request bodies: bytes to checked tensors and options."""
