"""Differential attention: `dense`, `gradients` and `cached` are what users call, the others how a call runs.

arguments, weights (checks) → config (tile shapes) → launch; of gradients: rows, then the kernels of attention backward
"""
