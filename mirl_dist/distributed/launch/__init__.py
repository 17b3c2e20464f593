"""The launcher: starts, stops and restarts ranks."""
