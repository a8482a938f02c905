"""What is true of the gradients of attention, and the comparison with the reference over drawn problems."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import call
from backward_calls import (
    after_forward,
    assert_gradients_right,
    assert_right,
    assert_same,
    bounds,
    call_backward,
    of_problem,
    same_bits,
)
from backward_formats import BF16, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.testing.arrays import place
from cuattn.testing.backward_problems import gradient_problems
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.strategies import aligned_layouts, examples, fill, layouts
from cuattn.testing.tolerance import assert_within, attention_bound

# A kernel is compiled for each dtype, pair of head-dim buckets, set of options, and for rows that are all aligned or
# not: tests draw from a few of those, and draw everything else. In one bucket, with rows of 16 bytes, and without:
EVEN = st.sampled_from([(32, 32), (24, 16), (8, 32), (32, 8)])
EVEN_64 = st.sampled_from([(64, 64), (40, 48), (64, 40)])
ODD = st.sampled_from([(31, 17), (1, 1), (5, 31), (29, 3), (13, 13)])


def form(dtype, head_dims, *options, layout=None, max_seqlen=130, **fixed):
    """A strategy of problems of one dtype, with the options that are drawn and those that are `fixed`."""

    def with_fixed(problem):
        problem.forward.options.update(fixed)
        return problem

    drawn = gradient_problems(
        dtype=st.just(dtype), head_dims=head_dims, options=options, layout=layout, max_seqlen=max_seqlen
    )
    return drawn.map(with_fixed)


FORMS = {
    "float16": form(F16, EVEN, "scale", "causal", layout=aligned_layouts()),
    "float16_odd": form(F16, ODD, "scale"),
    "float16_64": form(F16, EVEN_64, "scale", layout=aligned_layouts()),
    "float16_64_32": form(F16, st.sampled_from([(40, 7), (63, 31)]), "scale"),
    "bfloat16_128": form(BF16, st.sampled_from([(128, 97), (101, 120), (97, 98)]), "scale", max_seqlen=70, causal=True),
    "float32": form(F32, EVEN_64, "scale", layout=aligned_layouts(), max_seqlen=70),
    "float32_odd": form(F32, ODD, "scale", causal=True),
    "tf32": form(F32, EVEN_64, "scale", layout=aligned_layouts(), max_seqlen=70, precision="tf32"),
    "float64": form(F64, EVEN_64, "scale", layout=aligned_layouts(), max_seqlen=70),
}
#: Properties that need no variety of kernels share the first of them.
PLAIN = st.one_of(
    form(F16, EVEN, "scale", layout=aligned_layouts(), max_seqlen=70),
    form(F32, EVEN, "scale", layout=aligned_layouts(), max_seqlen=70),
)


def normal(dtype, batch=2, seqlens=(70, 135), heads=(2, 1), head_dims=None, seed=0):
    """q, k and v of standard normal numbers."""
    if head_dims is None:
        head_dims = (64, 64) if dtype == F64 else (32, 32)
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, seqlens[0], heads[0], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[1]),
    )
    return [fill(shape, dtype, "normal", rng) for shape in shapes]


def sums(grads, others):
    """The gradients in float64, `others` added."""
    each = [grads, *others]
    total = [sum(np.asarray(getattr(one, name)).astype(np.float64) for one in each) for name in ("dq", "dk", "dv")]
    return type(grads)(*total, None, None)


@pytest.mark.smoke
@pytest.mark.parametrize("name", FORMS)
@examples(6)
@given(data=st.data())
def test_agrees_with_the_reference(executor, name, data):
    problem = data.draw(FORMS[name])
    guarded = [problem.dout, problem.forward.q, problem.forward.k, problem.forward.v]
    before = [one.root.copy() for one in guarded]
    saved = of_problem(executor, problem)
    kept = saved.out.tobytes(), saved.lse.tobytes()
    grads = assert_right(executor, saved)
    assert grads.dbias is None and grads.dsinks is None
    for one, content in zip(guarded, before, strict=True):
        np.testing.assert_array_equal(one.root, content)  # inputs and their surroundings are only read
    assert (saved.out.tobytes(), saved.lse.tobytes()) == kept


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("float16_odd", "float32"))
@examples(6)
@given(data=st.data())
def test_gradients_are_written_in_place_and_nothing_beside_them(executor, name, data):
    saved = of_problem(executor, data.draw(FORMS[name]))
    layout = aligned_layouts() if name == "float32" else layouts()
    targets = {
        f"d{one}": executor.guarded(x.shape, x.dtype, data.draw(layout))
        for one, x in zip("qkv", saved.arrays[1:4], strict=True)
    }
    on_executor = [executor.array(x) for x in (saved.dout, saved.q, saved.k, saved.v, saved.out, saved.lse)]
    given_dlse = None if saved.dlse is None else executor.array(saved.dlse)
    result = cuattn.attention_backward(
        *on_executor, dlse=given_dlse, **saved.options, **{key: target.array for key, target in targets.items()}
    )
    for key, target in targets.items():
        assert getattr(result, key) is target.array
        target.check()
    assert_gradients_right(type(result)(*(None if x is None else executor.numpy(x) for x in result)), saved)


@examples(8)
@given(problem=gradient_problems(dtype=st.just(F16), head_dims=EVEN, options=("scale",), max_seqlen=70), data=st.data())
def test_layouts_do_not_change_a_bit(executor, problem, data):
    """Transposed, padded and misaligned arrays among NaN give what contiguous ones give; out, lse and dlse too."""
    saved = of_problem(executor, problem)
    scattered = saved.but(out=place(saved.out, data.draw(layouts())), lse=place(saved.lse, data.draw(layouts(3))))
    names = ("dout", "q", "k", "v", "out", "lse")
    dense = saved.but(**{key: np.ascontiguousarray(x) for key, x in zip(names, saved.arrays, strict=True)})
    if saved.dlse is not None:
        dense = dense.but(dlse=np.ascontiguousarray(saved.dlse.array))
    assert same_bits(call_backward(executor, scattered), call_backward(executor, dense))


def test_a_last_axis_that_is_strided(executor):
    saved = after_forward(executor, *normal(F16), dlse=True)
    backwards = saved.but(
        **{name: getattr(saved, name)[..., ::-1].copy()[..., ::-1] for name in ("q", "k", "v", "out", "lse", "dlse")}
    )
    assert same_bits(call_backward(executor, backwards), call_backward(executor, saved))


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_one_array_of_queries_keys_and_values(executor, dtype):
    """q, k and v are views of one projection, and so are their gradients."""
    packed = place(fill((2, 70, 3, 2, 32), dtype, "normal", np.random.default_rng(0)))
    views = [packed.array[:, :, i] for i in range(3)]
    saved = after_forward(executor, *views, dlse=True)
    expected = assert_right(executor, saved)
    target = executor.guarded(packed.array.shape, dtype)
    on_executor = [executor.array(x) for x in (saved.dout, *views, saved.out, saved.lse)]
    out = {f"d{name}": target.array[:, :, i] for i, name in enumerate("qkv")}
    cuattn.attention_backward(*on_executor, dlse=executor.array(saved.dlse), **out)
    target.check()
    whole = executor.numpy(target.array)
    assert same_bits([whole[:, :, i] for i in range(3)], expected[:3])


def test_one_array_as_all_of_them(executor):
    x = normal(F16, seqlens=(70, 70), heads=(2, 2))[0]
    assert_right(executor, after_forward(executor, x, x, x))


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_a_workspace_is_used_and_nothing_beside_it(executor, dtype):
    q, k, v = normal(dtype, head_dims=(40, 48) if dtype == F64 else (24, 16))
    saved = after_forward(executor, q, k, v, dlse=True)
    expected = call_backward(executor, saved)
    size = cuattn.attention_backward_workspace_size(*(executor.array(x) for x in (q, k, v)))
    workspace = executor.guarded((size,), np.uint8)  # full of NaN
    assert same_bits(call_backward(executor, saved, workspace=workspace.array), expected)
    workspace.check()
    assert (executor.numpy(workspace.array) != 0xFF).any()


# --- what the sums must be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_dlse", (False, True))
@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_a_shift_of_all_logits_of_a_row_changes_nothing(executor, dtype, with_dlse):
    """But lse, by itself: with 1 as a component of every key, dq there is scale times the sum of dS, scale dlse."""
    q, k, v = normal(dtype)
    k[..., 31] = 1
    saved = after_forward(executor, q, k, v, dlse=with_dlse, scale=0.25)
    grads = call_backward(executor, saved)
    _, bound = bounds(saved)
    # The saved out and lse are rounded: what they may be away from the softmax is what the sum may be.
    _, bound_out, _, bound_lse = attention_bound(q, k, v, scale=0.25)
    dout, out = (np.asarray(x).astype(np.float64) for x in (saved.arrays[0], saved.out))
    dlse = np.zeros(saved.lse.shape) if saved.dlse is None else saved.dlse.astype(np.float64)
    lost = (np.abs(dout) * bound_out).sum(axis=-1).swapaxes(1, 2)
    lost = lost + bound_lse * (np.abs(dout * out).sum(axis=-1).swapaxes(1, 2) + np.abs(dlse))
    limit = np.asarray(bound.dq)[..., 31].swapaxes(1, 2) + 0.25 * lost
    assert_within(grads.dq[..., 31].swapaxes(1, 2), 0.25 * dlse, limit, "sum of dS")


@examples(10)
@given(problem=PLAIN)
def test_values_of_one_constant_leave_no_gradient_of_logits(executor, problem):
    """The rows of P sum to 1, so that dq and dk are 0 within the bound; dv sums to dout."""
    v = problem.forward.v.array
    v[...] = 1
    saved = of_problem(executor, problem).but(dlse=None)
    grads = call_backward(executor, saved)
    expected, bound = bounds(saved)
    nothing = expected._replace(dq=expected.dq * 0, dk=expected.dk * 0)
    slack = bound._replace(dq=bound.dq + np.abs(expected.dq), dk=bound.dk + np.abs(expected.dk))
    assert_same(grads, nothing, slack)
    dout = saved.arrays[0].astype(np.float64)
    seen = dout.sum(axis=1).reshape(v.shape[0], v.shape[2], -1, v.shape[3]).sum(axis=2)
    lost = np.abs(dout).sum(axis=1).reshape(v.shape[0], v.shape[2], -1, v.shape[3]).sum(axis=2)
    assert_within(
        grads.dv.astype(np.float64).sum(axis=1), seen, np.asarray(bound.dv).sum(axis=1) + 1e-3 * lost, "sum of dv"
    )


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_twice_the_gradient_gives_twice_the_gradients(executor, dtype):
    """In bits, where no dS is subnormal."""
    saved = after_forward(executor, *normal(dtype, seqlens=(70, 70)), dlse=True)
    twice = saved.but(dout=saved.dout.array * dtype.type(2), dlse=saved.dlse * 2)
    grads, doubled = call_backward(executor, saved), call_backward(executor, twice)
    if dtype == F16:
        _, bound = bounds(twice)
        halves = type(grads)(*(2 * x.astype(np.float64) for x in grads[:3]), None, None)
        assert_same(doubled, halves, bound)
    else:
        assert same_bits([2 * x for x in grads[:3]], doubled[:3])


@examples(10)
@given(problem=PLAIN, seed=st.integers(0, 999))
def test_linear_in_dout(executor, problem, seed):
    """Of two gradients whose sum is exact."""
    saved = of_problem(executor, problem)
    rng = np.random.default_rng(seed)
    shape, dtype = saved.out.shape, saved.out.dtype
    parts = [saved.but(dout=rng.integers(-8, 9, shape).astype(dtype), dlse=None) for _ in range(2)]
    whole = saved.but(dout=parts[0].dout + parts[1].dout, dlse=None)
    each = [call_backward(executor, part) for part in parts]
    allowed = sums(bounds(whole)[1], [bounds(part)[1] for part in parts])
    assert_same(call_backward(executor, whole), sums(each[0], each[1:]), allowed)


@examples(8)
@given(problem=PLAIN)
def test_the_gradient_of_lse_is_added(executor, problem):
    saved = of_problem(executor, problem)
    dlse = fill(saved.lse.shape, accumulation_dtype(saved.out.dtype), "normal", np.random.default_rng(0))
    parts = [saved.but(dlse=None), saved.but(dout=np.zeros_like(saved.out), dlse=dlse)]
    whole = saved.but(dlse=dlse)
    each = [call_backward(executor, part) for part in parts]
    assert not each[1].dv.any()
    allowed = sums(bounds(whole)[1], [bounds(part)[1] for part in parts])
    assert_same(call_backward(executor, whole), sums(each[0], each[1:]), allowed)
    assert same_bits(call_backward(executor, saved.but(dlse=np.zeros_like(dlse))), each[0])


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_no_gradient_gives_none(executor, dtype):
    saved = after_forward(executor, *normal(dtype, seqlens=(70, 70)))
    grads = call_backward(executor, saved.but(dout=np.zeros_like(saved.out)))
    assert not any(x.any() for x in grads[:3])


@examples(10)
@given(
    problem=gradient_problems(
        dtype=st.sampled_from([F16, F32]),
        head_dims=EVEN,
        options=("scale",),
        layout=aligned_layouts(),
        max_seqlen=70,
        heads=st.sampled_from([(4, 2), (6, 3), (3, 1), (8, 2)]),
    )
)
def test_grouped_heads_equal_the_sum_over_repeated_ones(executor, problem):
    saved = of_problem(executor, problem)
    _, q, k, v = saved.arrays[:4]
    times = q.shape[2] // k.shape[2]
    repeated = saved.but(k=np.repeat(k, times, axis=2), v=np.repeat(v, times, axis=2))
    each, (_, bound) = call_backward(executor, repeated), bounds(repeated)

    def grouped(x):
        x = np.asarray(x).astype(np.float64)
        return x.reshape(*x.shape[:2], -1, times, x.shape[3]).sum(axis=3)

    expected = each._replace(dk=grouped(each.dk), dv=grouped(each.dv))
    allowed = bounds(saved)[1]
    allowed = allowed._replace(
        dq=allowed.dq + bound.dq, dk=allowed.dk + grouped(bound.dk), dv=allowed.dv + grouped(bound.dv)
    )
    assert_same(call_backward(executor, saved), expected, allowed)


@examples(8)
@given(problem=PLAIN, seed=st.integers(0, 999))
def test_order_of_keys_does_not_matter(executor, problem, seed):
    saved = of_problem(executor, problem)
    _, _, k, v = saved.arrays[:4]
    order = np.random.default_rng(seed).permutation(k.shape[1])
    permuted = call_backward(executor, saved.but(k=k[:, order], v=v[:, order]))
    grads = call_backward(executor, saved)
    expected = grads._replace(dk=grads.dk[:, order], dv=grads.dv[:, order])
    allowed = bounds(saved)[1]
    assert_same(permuted, expected, allowed._replace(dk=allowed.dk[:, order], dv=allowed.dv[:, order]))


@examples(8)
@given(problem=form(F16, EVEN, "causal", layout=aligned_layouts(), max_seqlen=40))
def test_batch_entries_and_heads_do_not_see_each_other(executor, problem):
    saved = of_problem(executor, problem)
    dout, q, k, v = saved.arrays[:4]
    b, g, times = q.shape[0] - 1, k.shape[2] - 1, q.shape[2] // k.shape[2]
    group = slice(g * times, None)
    own = saved.but(
        **{name: x[b:, :, group] for name, x in (("dout", dout), ("q", q), ("out", saved.out))},
        **{name: x[b:, :, g:] for name, x in (("k", k), ("v", v))},
        lse=saved.lse[b:, group],
        dlse=None if saved.dlse is None else saved.dlse.array[b:, group],
    )
    grads = call_backward(executor, saved)
    part = grads.dq[b:, :, group], grads.dk[b:, :, g:], grads.dv[b:, :, g:]
    assert same_bits(part, call_backward(executor, own)[:3])


# --- numbers ----------------------------------------------------------------------------------------------------------


def differences(function, x, step=1e-5):
    """The gradient of `function` at the float64 array `x` by central differences; `x` is restored."""
    result = np.empty_like(x)
    for at in np.ndindex(x.shape):
        kept = x[at]
        ends = []
        for shifted in (kept + step, kept - step):
            x[at] = shifted
            ends.append(function())
        x[at] = kept
        result[at] = (ends[0] - ends[1]) / (2 * step)
    return result


@pytest.mark.parametrize("everything", (False, True), ids=("plain", "everything"))
def test_finite_differences_of_attention(executor, everything):
    rng = np.random.default_rng(3)
    q, k, v = normal(F64, 1, (2, 4), (2, 1), (2, 2))
    options, extra = {"causal": True}, {}
    if everything:
        options |= {
            "softcap": 2.0,
            "alibi_slopes": [0.3, 0.1],
            "bias": rng.standard_normal((2, 2, 4)),
            "sinks": rng.standard_normal(2),
            "dropout_p": 0.3,
            "dropout_seed": 6,
        }
        extra = {"return_dbias": True}
    saved = after_forward(executor, q, k, v, dlse=True, **options)
    grads = call_backward(executor, saved, **extra)

    def loss():
        out, lse = call(executor, q, k, v, **options)
        return float((out * saved.dout.array).sum() + (lse * saved.dlse).sum())

    at = {"dq": q, "dk": k, "dv": v}
    at |= {"dbias": options["bias"], "dsinks": options["sinks"]} if everything else {}
    for name, x in at.items():
        np.testing.assert_allclose(getattr(grads, name), differences(loss, x), rtol=1e-6, atol=1e-8, err_msg=name)
