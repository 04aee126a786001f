"""Retrieval evaluation by the field's protocols."""
