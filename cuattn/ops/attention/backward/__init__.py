"""Gradients of attention: `dense` and `varlen` are what users call, the other modules are how a call runs.

arguments (checks) → config (tile shapes) → workspace → launch (rows, dq, dk and dv) → bias_launch (dbias, dsinks)
"""
