"""What is done with finished tickets: open, verify, pack, export, compare, report."""
