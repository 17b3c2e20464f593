"""Checks of a machine, and of a launch before it starts."""
