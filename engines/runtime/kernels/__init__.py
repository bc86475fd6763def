"""Choice between kernels that compute the same, by measurements on the device."""
