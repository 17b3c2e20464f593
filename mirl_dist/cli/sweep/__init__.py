"""Many runs as one: methods x seeds."""
