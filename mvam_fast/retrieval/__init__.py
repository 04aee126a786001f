"""Data, training, retrieval evaluation and pictures."""
