"""A character-level transformer, trained with NumPy and `cuattn.attention_backward`: no framework.

Forward and backward of attention are kernels; everything around them is NumPy or CuPy, each layer's backward beside its
forward. The same model is trained a second time in float64, from the same weights on the same batches, with attention
from `cuattn.reference`; the two losses are compared at every step. Run it with ``make train``, or
``python -m examples.char_transformer`` where the packages are installed already.
"""
