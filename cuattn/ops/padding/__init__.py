"""Padded batches to packed ones, and back."""
