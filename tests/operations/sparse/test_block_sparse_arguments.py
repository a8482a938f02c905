"""What the block-sparse functions refuse, before anything is launched or written, and what a call says about itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from idle_executor import install

import cuattn
from cuattn import BlockMask
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, OverlapError, ShapeError

MASK = BlockMask.from_blocks(np.eye(2, dtype=bool), 100, 80, (64, 64))


def arrays(dtype=np.float16, heads=2, batch=1):
    q, k = np.zeros((batch, 100, heads, 32), dtype), np.zeros((batch, 80, heads, 32), dtype)
    return q, k, k.copy()


def backward(q, k, v, mask, **options):
    out, lse = np.zeros_like(q), np.zeros((q.shape[0], q.shape[2], 100), np.float32)
    return cuattn.block_sparse_attention_backward(out, q, k, v, out, lse, mask, **options)


FUNCTIONS = pytest.mark.parametrize("function", [cuattn.block_sparse_attention, backward, cuattn.forward_path])


def call(function, q, k, v, mask, **options):
    if function is cuattn.forward_path:
        return function(q, k, v, block_mask=mask, **options)
    return function(q, k, v, mask, **options)


@FUNCTIONS
@pytest.mark.parametrize("mask", [np.ones((2, 2), bool), "causal", 3, [MASK]], ids=lambda x: type(x).__name__)
def test_no_mask(function, mask):
    with pytest.raises(ArgumentError, match="block_mask is"):
        call(function, *arrays(), mask)


@FUNCTIONS
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((101, 80), "of 101 queries, and there are 100"),
        ((100, 79), "of 79 keys, and there are 80"),
        ((3, 100, 80), "has 3 heads; 1 or 2 are needed"),
        ((2, 1, 100, 80), "has 2 batch entries; 1 or 1 are needed"),
    ],
)
def test_masks_of_something_else(function, shape, says):
    grid = (*shape[:-2], -(-shape[-2] // 16), -(-shape[-1] // 16))
    mask = BlockMask.from_blocks(np.ones(grid, bool), *shape[-2:], 16)
    with pytest.raises(ShapeError, match=says):
        call(function, *arrays(), mask)


@FUNCTIONS
def test_eight_bits(function):
    with pytest.raises(DTypeError, match="float8_e4m3fn"):
        call(function, *arrays(ml_dtypes.float8_e4m3fn), MASK)
    with pytest.raises(DTypeError, match="fp8"):
        call(function, *arrays(), MASK, precision="fp8")


@pytest.mark.parametrize("function", [cuattn.block_sparse_attention, backward])
def test_what_attention_refuses(function):
    q, k, v = arrays()
    with pytest.raises(ShapeError, match="k has head dim"):
        function(q, k[..., :16], v, MASK)
    with pytest.raises(NonFiniteError, match="scale"):
        function(q, k, v, MASK, scale=np.inf)
    with pytest.raises(ArgumentError, match="window"):
        function(q, k, v, MASK, window=3)
    with pytest.raises(ArrayTypeError):
        function(q, k, "v", MASK)
    with pytest.raises(TypeError, match="unexpected keyword argument 'q_descale'"):
        function(q, k, v, MASK, q_descale=None)


def test_out_apart_from_inputs():
    q, k, v = arrays()
    with pytest.raises(OverlapError):
        cuattn.block_sparse_attention(q, k, v, MASK, out=q)
    with pytest.raises(OverlapError):
        backward(q, k, v, MASK, dk=k)
    with pytest.raises(ShapeError, match="out"):
        cuattn.block_sparse_attention(q, k, v, MASK, out=np.zeros((1, 100, 2, 31), np.float16))


def test_nothing_of_the_size_of_the_logits(monkeypatch):
    """A long sequence: what a call allocates beside its result follows the kept blocks."""
    n, block = 1 << 20, 64
    mask = BlockMask.from_csr(np.arange(n // block + 1), np.arange(n // block), n, n, block)
    q = np.broadcast_to(np.float16(0), (1, n, 1, 64))
    idle = install(monkeypatch)
    cuattn.block_sparse_attention(q, q, q, mask)
    assert [x.nbytes for x in idle.allocated] == [q.nbytes]
    lists = sum({id(x): x.nbytes for arrays in mask._tile_lists.values() for x in arrays}.values())
    assert lists < 64 * mask.nnz


def test_path():
    q = np.zeros((1, 4096, 8, 128), np.float16)
    mask = BlockMask.from_blocks(np.eye(64, dtype=bool), 4096, 4096, 64)
    path = cuattn.forward_path(q, q, q, block_mask=mask, arch="sm_90", causal=True)
    assert path.kernel == "attention_forward" and path.row.block_m == 64
    assert path.options.label == "window" and "no wgmma" in path.reason
    small = BlockMask.from_blocks(np.eye(256, dtype=bool), 4096, 4096, 16)
    assert cuattn.forward_path(q, q, q, block_mask=small).row.block_m == 16
    with pytest.raises(ArgumentError, match="beside cu_seqlens_q"):
        cuattn.forward_path(q[0], q[0], q[0], [0, 4096], [0, 4096], block_mask=mask)
