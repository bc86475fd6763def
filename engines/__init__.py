"""From a PiD checkpoint to something that decodes: the network, the builder, the bundle, the runtimes."""
