"""Rotary position embedding, and the fused projection taken apart."""
