"""How the bundled decoder is trained and evaluated."""
