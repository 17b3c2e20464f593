"""MLflow tracking: records are kept on disk until delivered, and tickets can be read back."""
