"""Kernels of this project, written in Triton. Each module needs the package triton when it is imported.

A module has one operation: the kernel, a function that launches it, a custom operator of PyTorch around that function,
and the tile sizes to choose from per architecture. Its documentation names the function of `engines.pid` that computes
the same in plain PyTorch, and what differs in rounding.
"""
