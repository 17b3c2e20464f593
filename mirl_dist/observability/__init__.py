"""What a run shows: console, progress bars, logs, MLflow."""
