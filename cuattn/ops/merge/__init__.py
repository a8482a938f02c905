"""Attention over disjoint sets of keys, put together."""
