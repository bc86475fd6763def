"""What the Triton kernels need, by the compiler and by calculation; see docs/measurements/kernels.md."""
