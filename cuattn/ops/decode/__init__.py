"""Attention of a few queries over cached keys and values, contiguous or in pages."""
