"""The forward kernels: which one a call takes, in which shape, and its launch."""
