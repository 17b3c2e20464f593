"""Numerical comparison of tickets: statistics over seeds, judgements, mask overlap, and published results."""
