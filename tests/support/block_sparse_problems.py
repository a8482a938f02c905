"""Block-sparse problems: drawn masks and options, calls with NumPy arrays on any executor, what is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from attention_calls import prepare
from hypothesis import strategies as st

import cuattn
from cuattn import BlockMask, reference
from cuattn.testing import assert_attention_close, assert_gradients_close
from cuattn.testing.option_strategies import STRATEGIES, Drawn
from cuattn.testing.strategies import fill

OPTIONS = (
    *("scale", "causal", "window", "chunk", "softcap", "bias", "mask", "alibi_slopes", "sinks", "dropout"),
    "diagonal_offset",
)
BOUNDS = "scale", "causal", "window", "chunk", "sinks"


@dataclass(frozen=True)
class Problem:
    """The arrays of a call, its mask by blocks and by elements, and its options."""

    q: Any
    k: Any
    v: Any
    mask: BlockMask
    visible: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dense_options(self) -> dict[str, Any]:
        """The options of `cuattn.attention` that give the same."""
        given = self.options.get("mask")
        return {**self.options, "mask": self.visible if given is None else self.visible & (np.asarray(given) != 0)}


def random_mask(rng, seqlens, block_size, *, leading=(), density=0.4, elements=False):
    """A mask, and what it says by elements."""
    grid = (*leading, *(-(-n // b) for n, b in zip(seqlens, block_size, strict=True)))
    blocks = rng.random(grid) < density
    kept = rng.random((int(blocks.sum()), *block_size)) < 0.6 if elements else None
    mask = BlockMask.from_blocks(blocks, *seqlens, block_size, kept)
    return mask, reference.expand_blocks(blocks, *seqlens, block_size, kept)


def make(rng, dtype, *, batch=1, seqlens=(100, 150), heads=(2, 1), head_dims=(64, 64), block_size=(64, 64), **how):
    """A problem of normal numbers without options; ``how``: of `random_mask`."""
    (n, m), (h, g), (d, e) = seqlens, heads, head_dims
    q, k, v = (fill(shape, dtype, "normal", rng) for shape in ((batch, n, h, d), (batch, m, g, d), (batch, m, g, e)))
    return Problem(q, k, v, *random_mask(rng, seqlens, block_size, **how))


@st.composite
def problems(
    draw,
    dtype,
    *,
    block_sizes,
    options=(),
    head_dims=((64, 64),),
    most=3,
    max_seqlen=150,
    densities=(0.4, 0.1, 0.9, 0.0, 1.0),
    **fixed,
):
    """Draw a problem with a mask of one of the block sizes, and at most so many of the options beside ``fixed``."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, g, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 3), (1, 1, 5), (2, 2, 2)]))
    block_size = draw(st.sampled_from(block_sizes))
    lengths = st.one_of(st.sampled_from([1, block_size[0], 64, 65, 127, 128, 129]), st.integers(1, max_seqlen))
    seqlens = draw(st.tuples(lengths, lengths))
    leading = draw(st.sampled_from([(), (g * group,), (batch, 1), (batch, g * group)]))
    density = draw(st.sampled_from(densities))
    how = {"leading": leading, "density": density, "elements": draw(st.sampled_from([False, False, True]))}
    heads, dims = (g * group, g), draw(st.sampled_from(head_dims))
    of = {"batch": batch, "seqlens": seqlens, "heads": heads, "head_dims": dims, "block_size": block_size}
    problem = make(rng, dtype, **of, **how)
    drawn = Drawn(rng, batch, heads[0], g, *seqlens)
    chosen: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(options), unique=True, max_size=most)) if options else ():
        value = draw(STRATEGIES[name](drawn))
        chosen |= value if name == "dropout" else {name: value}
    problem.options.update(chosen | fixed)
    return problem


def call(executor, problem, **more):
    """(out, lse) of `cuattn.block_sparse_attention` as NumPy arrays."""
    arrays, options = prepare(executor, (problem.q, problem.k, problem.v), problem.options)
    out, lse = cuattn.block_sparse_attention(*arrays, problem.mask, return_lse=True, **options, **more)
    return executor.numpy(out), executor.numpy(lse)


def assert_right(executor, problem):
    """The call agrees with the reference; the result is returned."""
    out, lse = call(executor, problem)
    assert_attention_close(out, problem.q, problem.k, problem.v, lse=lse, **problem.dense_options)
    return out, lse


def assert_gradients_right(executor, problem, *, dlse=False, seed=0, **more):
    """The gradients after plain code's forward agree with the reference; they are returned."""
    out, lse = reference.attention_naive(problem.q, problem.k, problem.v, **problem.dense_options)
    rng = np.random.default_rng(seed)
    dout = fill(out.shape, out.dtype, "normal", rng)
    of_lse = fill(lse.shape, lse.dtype, "normal", rng) if dlse else None
    saved = dout, problem.q, problem.k, problem.v, out, lse
    arrays, options = prepare(executor, saved, problem.options)
    if of_lse is not None:
        options["dlse"] = executor.array(of_lse)
    grads = cuattn.block_sparse_attention_backward(*arrays, problem.mask, **options, **more)
    grads = type(grads)(*(None if x is None else executor.numpy(x) for x in grads))
    assert_gradients_close(grads, *saved, dlse=of_lse, **problem.dense_options)
    return grads
