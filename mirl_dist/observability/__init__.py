"""Console output, progress bars, rank logs and MLflow tracking."""
