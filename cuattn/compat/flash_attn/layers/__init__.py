"""Layers of the flash-attn package, as functions of arrays."""
