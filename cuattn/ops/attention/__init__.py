"""Attention over queries, keys and values that are all there: `dense`, `varlen` and `unfused` are what users call."""
