"""From a PiD checkpoint to a decoder: the network, the builder, the bundle and the runtimes."""

__version__ = "0.1.0"
