"""Text encoders: they turn prompts into the caption embeddings that decoders condition on."""
