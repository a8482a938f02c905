"""What models and attention calls cost, by their formulas: parameters, FLOPs, cache, traffic, memory, time at best.

Whole numbers in, whole numbers out: nothing is measured, no array is made, NumPy is not imported. Where a function says
bytes, those are the bytes that the kernels of this package move or allocate, which the tests compare with counted ones.

Examples
--------
>>> from cuattn import estimate
>>> llama = estimate.MODELS["Llama-3-8B"]
>>> estimate.parameters(llama)
8030261248
>>> estimate.kv_cache_bytes(llama, batch=1, seqlen=8192, format="bfloat16") / 2**30
1.0
>>> work = estimate.flops(llama, batch=1, seqlen=8192, phase="decode")
>>> estimate.roofline("H200", work, estimate.weight_bytes(llama)).bound
'memory'
"""

from __future__ import annotations

from cuattn.estimate.attention import (
    AttentionMemory,
    AttentionTraffic,
    attention_flops,
    attention_memory,
    attention_traffic,
)
from cuattn.estimate.gpus import GPU, GPUS, Roofline, arithmetic_intensity, roofline
from cuattn.estimate.models import MODELS, Config, model
from cuattn.estimate.scaling import Scaling, ring_hides_from, scaling
from cuattn.estimate.transformer import (
    FORMATS,
    Format,
    flops,
    kv_cache_bytes,
    layer_parameters,
    macs,
    parameters,
    weight_bytes,
)

__all__ = [
    "FORMATS",
    "GPU",
    "GPUS",
    "MODELS",
    "AttentionMemory",
    "AttentionTraffic",
    "Config",
    "Format",
    "Roofline",
    "Scaling",
    "arithmetic_intensity",
    "attention_flops",
    "attention_memory",
    "attention_traffic",
    "flops",
    "kv_cache_bytes",
    "layer_parameters",
    "macs",
    "model",
    "parameters",
    "ring_hides_from",
    "roofline",
    "scaling",
    "weight_bytes",
]
