"""Runtimes that execute a bundle: PyTorch, TensorRT, and a simulated one for tests and load generation."""
