"""Inputs of a build: checkpoints, random weights, captions, calibration latents."""
