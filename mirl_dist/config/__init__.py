"""The typed config of a run, its loading from YAML, and small shared helpers."""
