"""Training and evaluation of the bundled decoder."""
