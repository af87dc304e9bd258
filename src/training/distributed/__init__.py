"""Several processes: how they start, agree and share a model."""
