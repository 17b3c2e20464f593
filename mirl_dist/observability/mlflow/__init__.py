"""MLflow: records kept until they are delivered, and reading back."""
