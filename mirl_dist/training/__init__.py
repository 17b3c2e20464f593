"""Runs rounds of training, scoring, pruning and rewinding."""
