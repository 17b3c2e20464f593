"""Distributed search for winning tickets in all-in-one image restoration networks."""

__version__ = "0.1.0"
