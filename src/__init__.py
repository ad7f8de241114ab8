"""RouteSAE-repro: train, evaluate, apply and read sparse autoencoders over several layers of a language model."""

__version__ = "1.0.0"
