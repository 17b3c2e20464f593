"""Sweeps: many runs, methods x seeds, started by one command."""
