"""Sparse attention: which blocks of keys each block of queries reads, and attention that does that work only."""
