"""The typed tree of a run, and how YAML becomes one."""
