"""Which calls take the Hopper kernel: the rule, and that cuattn.forward_path says what forward does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn.errors import ArgumentError, EnvironmentVariableError, LaunchError, NotSupportedError
from cuattn.ops.attention.forward import hopper_launch
from cuattn.ops.attention.forward import launch as forward
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.variants import PLAIN
from cuattn.runtime import executor as executors
from cuattn.testing import kernels
from cuattn.testing.arrays import Layout, place

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
HOPPER = "attention_forward_hopper"


def arrays(dtype=F16, *, head_dims=(64, 64), layout=None, seqlens=(20, 30), heads=(2, 1), batch=2):
    shapes = (
        (batch, seqlens[0], heads[0], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[1]),
    )
    return [place(np.ones(shape, dtype), layout).array for shape in shapes]


def path(*inputs, **options):
    return cuattn.forward_path(*inputs, arch="sm_90a", **options)


TAKEN = {
    "float16": (arrays(), {}),
    "bfloat16": (arrays(BF16, head_dims=(256, 8)), {}),
    "float8_e4m3fn": (arrays(ml_dtypes.float8_e4m3fn), {"precision": "fp8"}),
    "one_query": (arrays(seqlens=(1, 30)), {}),
    "padded_rows": (
        [place(np.ones(shape, F16), Layout(pad=(0, 0, 0, 7))).array for shape in ((2, 20, 2, 33), (2, 30, 1, 33))]
        + [place(np.ones((2, 30, 1, 5), F16), Layout(pad=(0, 0, 0, 3))).array],
        {},
    ),
    "heads_first": (arrays(layout=Layout(order=(0, 2, 1, 3))), {}),
    "offset_of_16_bytes": (arrays(layout=Layout(offset=8)), {}),
    "causal": (arrays(), {"causal": "top_left", "diagonal_offset": 3}),
    "window": (arrays(), {"window": (3, 4), "diagonal_offset": np.int32([1, 2])}),
    "softcap": (arrays(), {"softcap": 3.0}),
    "alibi": (arrays(), {"alibi_slopes": np.float32([0.5, 0.25])}),
    "sinks": (arrays(), {"sinks": np.float32([0.5, 0.25])}),
    "scale": (arrays(), {"scale": -1.0}),
    "dropout_of_0": (arrays(), {"dropout_p": 0.0, "dropout_seed": 5}),
    "axes_of_1_with_any_stride": ([x[:1, :, :1] for x in arrays(head_dims=(64, 64), heads=(3, 3))], {}),
    "last_axis_strided": ([np.ones((2, 20, 2, 128), F16)[..., ::2]] * 3, {}),  # copied
}


def halfway(x):
    """A view that begins 8 bytes behind a multiple of 16."""
    return place(x, Layout(offset=4)).array


LEFT_TO_OTHERS = {
    "float32": (
        arrays(np.float32),
        {},
        "the elements are float32; float16, bfloat16, float8_e4m3fn are multiplied by wgmma",
    ),
    "float8_e5m2": (arrays(ml_dtypes.float8_e5m2), {}, "the elements are float8_e5m2"),
    "float8_e4m3fn": (arrays(ml_dtypes.float8_e4m3fn), {}, 'products of 8 bits are for precision="fp8"'),
    "bias": (arrays(), {"bias": np.zeros((20, 30), np.float32)}, "the call has a bias"),
    "mask": (arrays(), {"mask": np.ones(30, bool)}, "the call has a mask"),
    "dropout": (arrays(), {"dropout_p": 0.1}, "the call has dropout"),
    "no_keys": (arrays(seqlens=(20, 0)), {}, "there is nothing to compute"),
    "no_queries": (arrays(seqlens=(0, 20)), {}, "there is nothing to compute"),
    "no_batch": (arrays(batch=0), {}, "there is nothing to compute"),
    "odd_rows": (arrays(head_dims=(33, 64)), {}, "sequence stride of q is 132 bytes, no multiple of 16"),
    "odd_rows_of_v": (arrays(head_dims=(64, 20)), {}, "sequence stride of v is 40 bytes, no multiple of 16"),
    "odd_copies": ([np.ones((2, 20, 2, 66), F16)[..., ::2]] * 3, {}, "the rows of a copy of q is 66 bytes"),
    "odd_base": ([*arrays()[:1], halfway(arrays()[1]), arrays()[2]], {}, "k begins at an address that is no multiple"),
    "reversed": ([arrays()[0][:, ::-1], *arrays()[1:]], {}, "the sequence stride of q is -256 bytes"),
    "broadcast": (
        [np.broadcast_to(arrays()[0][:1], (2, 20, 2, 64)), *arrays()[1:]],
        {},
        "batch stride of q is 0 bytes",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_calls_that_the_hopper_kernel_takes(name):
    inputs, options = TAKEN[name]
    found = path(*inputs, **options)
    assert (found.kernel, found.arch, found.tuned) == (HOPPER, "sm_90a", False)
    assert found.row in HOPPER_FWD_CONFIGS
    assert "wgmma" in found.reason


@pytest.mark.parametrize("name", LEFT_TO_OTHERS)
def test_calls_that_are_left_to_the_portable_kernels(name):
    inputs, options, reason = LEFT_TO_OTHERS[name]
    found = path(*inputs, **options)
    assert found.kernel == ("attention_forward_fma" if inputs[0].dtype == np.float32 else "attention_forward")
    assert found.row in FLASH_FWD_CONFIGS
    assert found.reason.startswith("not the Hopper kernel: ") and reason in found.reason
    with pytest.raises(NotSupportedError, match="does not take this call"):
        kernels.attention(*inputs, config=HOPPER_FWD_CONFIGS[0], **options)


def test_other_architectures_keep_the_portable_kernels():
    for arch in ("sm_80", "sm_90", "sm_100a", "sm_120a"):
        found = cuattn.forward_path(*arrays(), arch=arch)
        assert (found.kernel, found.arch, found.options) == ("attention_forward", arch, PLAIN)
        assert f"compiled for {arch}, which has no wgmma" in found.reason
    assert cuattn.forward_path(*arrays()).arch == "sm_80"


def test_a_variable_switches_it_off(monkeypatch):
    monkeypatch.setenv("CUATTN_HOPPER", "off")
    found = path(*arrays())
    assert (found.kernel, found.reason) == ("attention_forward", "not the Hopper kernel: CUATTN_HOPPER=off")
    with pytest.raises(NotSupportedError, match="CUATTN_HOPPER=off"):
        kernels.attention(*arrays(), config=HOPPER_FWD_CONFIGS[0])
    monkeypatch.setenv("CUATTN_HOPPER", "auto")
    assert path(*arrays()).kernel == HOPPER
    monkeypatch.setenv("CUATTN_HOPPER", "on")
    with pytest.raises(EnvironmentVariableError, match="auto or off"):
        path(*arrays())


def test_packed_sequences():
    q, k, v = (x[0] for x in arrays())
    found = path(q, k, v, [0, 5, 20], [0, 30, 30], causal=True)
    assert found.kernel == HOPPER and found.options.bound_right
    assert path(q, k[:0], v[:0], [0, 5, 20], [0, 0, 0]).kernel == "attention_forward"
    with pytest.raises(ArgumentError, match="cu_seqlens_k is None"):
        path(q, k, v, [0, 5, 20])
    with pytest.raises(ArgumentError, match="cu_seqlens_q ends at 19"):
        path(q, k, v, [0, 5, 19], [0, 30, 30])


def test_the_question_is_checked_as_the_call_is():
    q, k, v = arrays()
    with pytest.raises(cuattn.errors.ShapeError, match="k has head dim 32"):
        path(q, k[..., :32], v)
    with pytest.raises(ArgumentError, match="arch='sm_1' is not"):
        cuattn.forward_path(q, k, v, arch="sm_1")
    with pytest.raises(NotSupportedError, match="sm_75 is not supported"):
        cuattn.forward_path(q, k, v, arch="sm_75")


def test_a_path_reads_as_a_sentence():
    text = str(path(*arrays(BF16, seqlens=(300, 300)), causal=True))
    assert text.startswith(f"{HOPPER} (causal) for sm_90a, tiles of ") and "by the table" in text


class Launched(Exception):
    """Instead of compiling a kernel: which one it would have been."""


@pytest.fixture
def instead_of_compiling(monkeypatch):
    def kernel(self, source, constants, entry):
        raise Launched(self.arch, source, constants["BLOCK_M"], constants["BLOCK_N"])

    for plan in (forward._loaded, hopper_launch._loaded):
        plan.cache_clear()  # or a kernel that another test has compiled would run
    monkeypatch.setattr(executors.HostExecutor, "kernel", kernel)


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_forward_does_what_the_path_says(instead_of_compiling, monkeypatch, arch):
    monkeypatch.setenv("CUATTN_HOST_ARCH", arch)
    cases = [*TAKEN.values(), *((inputs, options) for inputs, options, _ in LEFT_TO_OTHERS.values())]
    for inputs, options in cases:
        if any(name in options for name in ("bias", "mask")) or inputs[0].size == 0:
            continue  # another kernel is compiled before, or none at all
        found = cuattn.forward_path(*inputs, **options)
        with pytest.raises(Launched) as launched:
            cuattn.attention(*inputs, **options)
        assert launched.value.args == (arch, found.kernel, found.row.block_m, found.row.block_n)


def test_a_config_is_obeyed_or_refused(instead_of_compiling, monkeypatch):
    inputs = arrays()
    for arch in ("sm_80", "sm_90a"):
        monkeypatch.setenv("CUATTN_HOST_ARCH", arch)
        with pytest.raises(Launched, match=f"'sm_90a', '{HOPPER}', 192"):
            kernels.attention(*inputs, config=HOPPER_FWD_CONFIGS[3])
        with pytest.raises(Launched, match=f"'{arch}', 'attention_forward', 128, 32"):
            kernels.attention(*inputs, config=FLASH_FWD_CONFIGS[4])
    large = arrays(head_dims=(128, 64))
    with pytest.raises(LaunchError, match="config is for head dims up to 64 and 64; the call has 128 and 64"):
        kernels.attention(*large, config=HOPPER_FWD_CONFIGS[3])
    with pytest.raises(LaunchError, match="is not legal for head dims"):
        kernels.attention(*inputs, config=HopperFwdConfig(128, 128, 2, 128, 9, 24, 240))
