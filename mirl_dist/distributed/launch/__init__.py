"""The launcher: starts ranks, stops them, starts them again."""
