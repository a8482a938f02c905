"""Programs that use cuattn on real input."""
