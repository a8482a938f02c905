"""A function of another library to compare with, and how arrays get there and back.

A peer takes the very arrays that cuattn gets, through DLPack and without a copy, runs on the same stream, and has its
output checked before it is timed. One that refuses a problem becomes a record that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Inputs = Mapping[str, Any]
#: Takes case and inputs, returns the call to time. What it returns is [B, N, H, E] as an array, or [B, H, N, E] as a
#: tensor of torch.
Prepare = Callable[[Any, Inputs], Callable[[], Any]]

NAIVE_MAX_LOGITS = 2**28  # N × M matrices in memory, several of them, in float32


class PeerError(Exception):
    """A peer cannot do this problem."""


class PeerGrads(NamedTuple):
    """What a peer computes of the gradients: tensors in the layout of q, k and v."""

    dq: Any
    dk: Any
    dv: Any


@dataclass(frozen=True, slots=True)
class Peer:
    """A function of another library.

    ``waits``: its call returns when its work is done, because it does not run on the stream of the others: wall-clock
    time is taken of it instead of CUDA events.
    """

    name: str
    prepare: Prepare
    waits: bool = False


def require_aligned_causal(case: Any) -> None:
    """Raise `PeerError` for a causal mask that is aligned at the corner that most libraries do not have."""
    if case.causal and case.seqlen_q != case.num_keys:
        raise PeerError("its causal mask is aligned at the other corner")


def require_few_logits(case: Any) -> None:
    """Raise `PeerError` where the matrix of logits would be too large."""
    if case.batch * case.num_heads * case.seqlen_q * case.num_keys > NAIVE_MAX_LOGITS:
        raise PeerError("the matrix of logits is too large to be worth it")


def to_torch(x: Any) -> Any:
    """An array as a torch tensor on the same memory. bfloat16 travels as int16, which every version exports."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def to_array(x: Any) -> Any:
    """A torch tensor as an array of CuPy, or of NumPy where it lies on the host; bfloat16 becomes float32."""
    import torch

    wide = (x.float() if x.dtype == torch.bfloat16 else x).detach().contiguous()
    if not x.is_cuda:
        return wide.numpy()
    import cupy

    return cupy.from_dlpack(wide)


def as_array(out: Any) -> Any:
    """The output of a peer's call as an array: [B, N, H, E] for attention; of gradients, three of them."""
    if isinstance(out, PeerGrads):
        return PeerGrads(*map(to_array, out))
    if type(out).__module__.partition(".")[0] != "torch":
        return out
    return to_array(out.transpose(1, 2) if out.ndim == 4 else out)
