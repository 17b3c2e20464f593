"""Process groups, collectives, engines and the launcher."""
