"""RouteSAE-repro: sparse autoencoders over several layers of a language model."""

__version__ = "1.0.0"
