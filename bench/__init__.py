"""Measurements. Run from a checkout: ``python -m bench.<name>``."""
