"""Which class each handler counts under in `cuattn.host.profile`."""

from __future__ import annotations

#: The class of a check that belongs to the instruction behind it.
NOT_COUNTED = "not counted"

#: Handlers outside arithmetic.
CORE_CLASSES = {
    "bra": "control", "brx": "control", "exit": "control", "trap": "control", "nop": "control",
    "bar": "barrier", "fence": "barrier", "warp_sync": "barrier", "proxy_fence": "barrier", "mbarrier_fence": "barrier",
    "cluster_arrive": "barrier", "cluster_wait": "barrier", "mapa": "memory", "getctarank": "memory",
    "mbarrier_init": "barrier", "mbarrier_inval": "barrier", "mbarrier_arrive": "barrier", "mbarrier_wait": "barrier",
    "mbarrier_pending_count": "barrier", "setmaxnreg": "control",
    "wgmma": "mma", "wgmma_fence": "barrier", "wgmma_commit": "async", "wgmma_wait": "async",
    "ld": "memory", "st": "memory", "ld_param": "memory", "param_address": "memory", "isspacep": "memory",
    "atom": "atomic",
    "bulk_load": "async", "bulk_copy": "async", "bulk_store": "async", "bulk_tensor_load": "async",
    "bulk_tensor_store": "async", "bulk_prefetch": "async", "bulk_prefetch_map": "async", "bulk_commit": "async",
    "bulk_wait": "async", "cache_policy": NOT_COUNTED,
    "cp_async": "async", "cp_async_commit": "async", "cp_async_wait": "async",
    "cp_async_arrive": "async",
    "shfl": "collective", "vote": "collective", "match": "collective", "redux": "collective",
    "activemask": "collective", "elect": "collective", "ldmatrix": "matrix", "stmatrix": "matrix",
}  # fmt: skip


def class_of(op: str) -> str:
    """Return the class of a handler by the handler's name."""
    if op in CORE_CLASSES:
        return CORE_CLASSES[op]
    return "mma" if op.startswith("mma_") else _arithmetic_class(op)


#: Arithmetic handlers by the start of their name, then by the end; what is left works on integers.
PREFIX_CLASSES = {
    "setp_": "predicate", "selp_": "predicate", "slct_": "predicate", "testp_": "predicate", "not_pred": "predicate",
    "cvt_": "convert", "convert": "convert", "mov_": "move", "pack_": "move", "unpack_": "move",
    "ex2_": "special", "lg2_": "special", "sin_": "special", "cos_": "special", "tanh_": "special", "rcp_": "special",
    "sqrt_": "special", "rsqrt_": "special", "div_approx_": "special", "f32_modified": "float", "f64_rounded": "double",
}  # fmt: skip
SUFFIX_CLASSES = {"_f32": "float", "_f64": "double", "f16": "half"}


def _arithmetic_class(op: str) -> str:
    for prefix, name in PREFIX_CLASSES.items():
        if op.startswith(prefix):
            return name
    for suffix, name in SUFFIX_CLASSES.items():
        if op.endswith(suffix):
            return name
    return "int"
