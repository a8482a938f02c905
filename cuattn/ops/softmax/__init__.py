"""Softmax along an axis, whole or in pieces."""
