"""RouteSAE-repro: sparse autoencoders over several layers of a language model."""

import os

__version__ = "1.0.0"

# How often a waiting thread looks before it gives up its core. With the library's own 300,000 a
# step was about 40 times slower on a busy machine, and no faster on a quiet one (docs/LOG.md).
# It is read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
