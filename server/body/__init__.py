"""Request bodies: from received bytes to validated tensors and options."""
