"""Experiments: each is a command that trains, measures and writes its tables and pictures.

See `python -m experiments.routing --help`.
"""
