"""Modules with the names that flash-attn's own tests import, over `cuattn.compat`."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch_arrays import Differentiable, adapted, array, dtype_name, tensor

from cuattn.compat import flash_attn as two
from cuattn.compat import flash_attn_interface as three
from cuattn.compat.flash_attn import bert_padding
from cuattn.compat.flash_attn.layers import rotary


def _module(name, **contents):
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def _seed(dropout_p):
    """A seed from PyTorch's generator, as the package draws it."""
    return {} if dropout_p == 0 else {"dropout_seed": int(torch.randint(2**31, ()))}


def _second(name, num_arrays):
    """The function ``name`` of flash-attn 2, whose first arguments are that many differentiable arrays."""
    forward, backward = getattr(two, name), getattr(two, f"{name}_backward")

    def call(*args, dropout_p=0.0, return_attn_probs=False, block_table=None, **options):
        tensors, rest = args[:num_arrays], [array(x) for x in args[num_arrays:]]
        num_lists = 0 if "varlen" not in name else 2 if "qkvpacked" in name else 4
        if len(rest) > num_lists:
            dropout_p, *more = rest[num_lists:]
            options |= dict(zip(("softmax_scale", "causal", "window_size"), more, strict=False))
        lists = rest[:num_lists]
        options = {key: array(x) for key, x in options.items()} | {"dropout_p": dropout_p, **_seed(dropout_p)}
        if block_table is not None:
            paged = partial(forward, block_table=array(block_table), **options)
            return adapted(lambda *arrays: paged(*arrays, *lists))(*tensors)
        out, lse = Differentiable.apply(
            lambda *arrays: forward(*arrays, *lists, **options, return_attn_probs=True)[:2],
            lambda *arrays: backward(*arrays, *lists, **options),
            *tensors,
        )
        return (out, lse, None) if return_attn_probs else out

    return call


def _third(forward, backward, names):
    """A function of flash-attn 3 with gradients, whose first arguments are q, k and v and then ``names``."""

    def call(q, k, v, *args, return_attn_probs=False, **options):
        options |= dict(zip(names, args, strict=False))
        options = {key: array(x) for key, x in options.items()}
        kept = (*names, "softmax_scale", "causal", "window_size", "softcap", "deterministic")
        shared = {key: options[key] for key in kept if key in options}
        out, lse = Differentiable.apply(
            lambda *arrays: forward(*arrays, **options, return_attn_probs=True),
            lambda *arrays: backward(*arrays, **shared),
            *(q, k, v),
        )
        return (out, lse) if return_attn_probs else out

    return call


class _Unpadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, unused):
        result = bert_padding.unpad_input(array(x), array(mask), array(unused))
        ctx.indices, ctx.shape = result[1], x.shape[:2]
        tokens, *others = map(tensor, result)
        ctx.mark_non_differentiable(*(other for other in others if isinstance(other, torch.Tensor)))
        return tokens, *others

    @staticmethod
    def backward(ctx, gradient, *_):
        return tensor(bert_padding.pad_input(array(gradient), ctx.indices, *ctx.shape)), None, None


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, batch, seqlen):
        ctx.save_for_backward(indices)
        return tensor(bert_padding.pad_input(array(x), array(indices), batch, seqlen))

    @staticmethod
    def backward(ctx, gradient):
        rows = array(gradient).reshape(-1, *gradient.shape[2:])
        return tensor(bert_padding.index_first_axis(rows, array(ctx.saved_tensors[0]))), None, None, None


def _combine(out_partial, lse_partial, out=None, out_dtype=None):
    return adapted(three.flash_attn_combine)(out_partial, lse_partial, out, dtype_name(out_dtype))


def modules():
    """Every module, by name."""
    arrays = {"": 3, "kvpacked_": 2, "qkvpacked_": 1}
    second = {
        name: _second(name, count)
        for form in ("", "varlen_")
        for packed, count in arrays.items()
        for name in [f"flash_attn_{form}{packed}func"]
    }
    second["flash_attn_with_kvcache"] = adapted(two.flash_attn_with_kvcache)
    padding = {"unpad_input": lambda x, mask, unused=None: _Unpadded.apply(x, mask, unused), "pad_input": _Padded.apply}
    lists = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k")
    apply_rotary_emb = adapted(rotary.apply_rotary_emb)
    third = {
        "flash_attn_func": _third(three.flash_attn_func, three.flash_attn_func_backward, ()),
        "flash_attn_varlen_func": _third(three.flash_attn_varlen_func, three.flash_attn_varlen_func_backward, lists),
        "flash_attn_combine": _combine,
        "flash_attn_with_kvcache": adapted(three.flash_attn_with_kvcache),
        "get_scheduler_metadata": lambda *args, **kwargs: None,  # nothing is planned ahead
    }
    return {
        "flash_attn": _module("flash_attn", __path__=[], **second),
        "flash_attn.bert_padding": _module("flash_attn.bert_padding", **padding),
        "flash_attn.flash_attn_interface": _module(
            "flash_attn.flash_attn_interface", _get_block_size_n=lambda *_: 64, USE_TRITON_ROCM=False
        ),
        "flash_attn.layers": _module("flash_attn.layers", __path__=[]),
        "flash_attn.layers.rotary": _module("flash_attn.layers.rotary", apply_rotary_emb=apply_rotary_emb),
        "padding": _module("padding", **padding),
        "flash_attn_interface": _module("flash_attn_interface", **third),
    }
