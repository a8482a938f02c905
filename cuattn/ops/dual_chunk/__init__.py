"""Dual-chunk attention: long contexts for models that were trained on short ones."""
