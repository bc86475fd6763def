"""Image encoding: PNG in parallel strips, WebP and JPEG."""
