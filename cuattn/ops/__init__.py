"""What the library computes: one package for each family of kernels."""
