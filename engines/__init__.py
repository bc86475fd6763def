"""The PiD decoder: network, bundle format, engine builder, runtimes, bundled decoder and its training."""

__version__ = "0.1.0"
