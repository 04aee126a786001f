"""Contrastive training on one process or many."""
