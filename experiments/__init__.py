"""Experiments: each a command that trains, measures and writes its tables and pictures. `python -m experiments.routing --help`"""
