"""What a machine offers, and what a launch would meet."""
