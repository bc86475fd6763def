"""The process and its resources: descriptors, listening sockets, threads, output, the exit after a failure."""
