"""Performance of a decode: lower bounds of the device, the reference implementation, and checks of a GPU."""
