"""cuattn.tune: every legal shape is timed, the fastest is kept and taken from then on; with a stand-in for time."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from simulated_cupy import installed

import cuattn
from cuattn.compile import arch as archs
from cuattn.compile import cache
from cuattn.errors import ArgumentError, LaunchError, NotSupportedError
from cuattn.ops.attention.forward import hopper_launch, hopper_select, tuned_rows
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.attention.forward.hopper_config import HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS
from cuattn.runtime import executor as executors
from cuattn.runtime.timer import Timing
from cuattn.testing.arrays import Layout, place

SHAPES = (1, 300, 8, 64), (1, 500, 2, 64), (1, 500, 2, 64)


class Gpu:
    """A simulated device on which kernels do nothing and take the time that a test wants: 1 µs for its favorite."""

    def __init__(self, cupy, monkeypatch, arch):
        self.cupy, self.favorite, self.launched, self.num_timed = cupy, None, [], 0
        self.name = b"Simulated 100"
        cupy.cuda.runtime = SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda _: {"name": self.name})
        monkeypatch.setattr(executors.compile, "for_device", lambda device: archs.Target(arch, "ptx"))
        monkeypatch.setattr(executors.CudaExecutor, "kernel", lambda _, source, constants, entry: (source, constants))
        monkeypatch.setattr(executors.CudaExecutor, "launch", lambda _, kernel, *rest: self.launched.append(kernel))
        monkeypatch.setattr(hopper_launch, "tensor_map", lambda array, box, **view: SimpleNamespace(value=box))
        monkeypatch.setattr(hopper_select, "_can_make_maps", lambda: True)
        monkeypatch.setattr(importlib.import_module("cuattn.ops.attention.forward.tune"), "CudaTimer", lambda: self)

    def time(self, call):
        call()
        self.num_timed += 1
        return Timing((1.0 if self.is_favorite(*self.launched[-1]) else 1.0 + self.num_timed,))

    def is_favorite(self, source, constants):
        row = self.favorite
        return source == row.source and all(
            constants[name.upper()] == getattr(row, name)
            for name in ("block_m", "block_n", "num_stages", "num_warps", "ping_pong")
            if hasattr(row, name)
        )

    def arrays(self, shapes=SHAPES, layout=None, dtype=np.float16):
        return [self.cupy.wrap(place(np.ones(shape, dtype), layout).array) for shape in shapes]

    def takes_the_favorite(self, *arrays, **options):
        """Whether a call does, and whether `forward_path` says so."""
        self.launched.clear()
        cuattn.attention(*arrays, **options)
        (kernel,) = self.launched
        path = cuattn.forward_path(*arrays, **options)
        assert path.tuned == (path.row == self.favorite) == self.is_favorite(*kernel)
        return path.tuned


@pytest.fixture(params=["sm_80", "sm_90a"])
def gpu(request, monkeypatch, tmp_path):
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "cache"))
    with installed(monkeypatch) as cupy:
        yield Gpu(cupy, monkeypatch, request.param)


def restart():
    """What a process knows only from the cache."""
    tuned_rows._rows.cache_clear()


def favorite_of(gpu):
    """A row that no call takes by itself."""
    hopper = executors.cuda_executor(0).arch == "sm_90a"
    return HOPPER_ALTERNATIVES[-1] if hopper else FLASH_FWD_CONFIGS[1]


def test_the_fastest_row_is_found_and_taken_from_then_on(gpu):
    gpu.favorite = favorite_of(gpu)
    arrays = gpu.arrays()
    assert not gpu.takes_the_favorite(*arrays, causal=True)
    found = cuattn.tune(*arrays, causal=True)
    assert found.row == gpu.favorite and found.times_us[0] == (gpu.favorite, 1.0)
    times = [time for _, time in found.times_us]
    assert times == sorted(times) and len(times) == gpu.num_timed > 3
    for _ in range(2):
        assert gpu.takes_the_favorite(*arrays, causal=True)
        assert not gpu.takes_the_favorite(*arrays)
        restart()


def shape_of(row):
    """What makes the kernel, without the calls that the row is meant for."""
    return row.source, row.block_m, row.block_n, row.num_threads, row.num_stages, getattr(row, "ping_pong", None)


def test_every_legal_row_is_tried(gpu):
    gpu.favorite = favorite_of(gpu)
    found = cuattn.tune(*gpu.arrays())
    tables = [row for row in FLASH_FWD_CONFIGS if row.products == "mma" and row.itemsize == 2]
    if executors.cuda_executor(0).arch == "sm_90a":
        tables += [row for row in HOPPER_FWD_CONFIGS + HOPPER_ALTERNATIVES if row.itemsize == 2]
    tried = [shape_of(row) for row, _ in found.times_us]
    assert len(tried) == len(set(tried)) and set(tried) == set(map(shape_of, tables))
    scores = cuattn.tune(*gpu.arrays(), softcap=2.0, alibi_slopes=np.ones(8, np.float32))
    assert all(row.score_options for row, _ in scores.times_us)
    floats = cuattn.tune(*gpu.arrays(dtype=np.float32))
    assert {row.products for row, _ in floats.times_us} == {"fma"}


def test_calls_of_the_same_class_are_alike(gpu):
    """Lengths up to the same power of two; other dtypes, head dims, heads and options are not."""
    gpu.favorite = favorite_of(gpu)
    cuattn.tune(*gpu.arrays())
    assert gpu.takes_the_favorite(*gpu.arrays(((1, 257, 8, 40), (1, 512, 2, 40), (1, 512, 2, 64))))
    for shapes in (
        ((1, 513, 8, 64), (1, 500, 2, 64), (1, 500, 2, 64)),
        ((1, 300, 8, 64), (1, 513, 2, 64), (1, 513, 2, 64)),
        ((2, 300, 8, 64), (2, 500, 2, 64), (2, 500, 2, 64)),
        ((1, 300, 8, 64), (1, 500, 4, 64), (1, 500, 4, 64)),
        ((1, 300, 8, 64), (1, 500, 2, 64), (1, 500, 2, 96)),
    ):
        assert not gpu.takes_the_favorite(*gpu.arrays(shapes)), shapes
    assert not gpu.takes_the_favorite(*gpu.arrays(), window=(100, 0))


def test_packed_sequences_are_a_class_of_their_own(gpu):
    gpu.favorite = favorite_of(gpu)
    dense = gpu.arrays()
    starts = np.int32([0, 300]), np.int32([0, 500])
    q, k, v = (x[0] for x in dense)
    cuattn.tune(q, k, v, *starts)
    assert not gpu.takes_the_favorite(*dense)
    gpu.launched.clear()
    cuattn.attention_varlen(q, k, v, *starts)
    assert gpu.is_favorite(*gpu.launched[-1])
    assert cuattn.forward_path(q, k, v, *starts).tuned


def test_what_is_kept_is_for_this_kind_of_device_and_this_cache(gpu, monkeypatch, tmp_path):
    gpu.favorite = favorite_of(gpu)
    arrays = gpu.arrays()
    cuattn.tune(*arrays)
    with monkeypatch.context() as patch:
        patch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "other"))
        assert not gpu.takes_the_favorite(*arrays)
    assert gpu.takes_the_favorite(*arrays)
    gpu.name = b"Simulated 200"
    tuned_rows.device_name.cache_clear()
    assert not gpu.takes_the_favorite(*arrays)
    cuattn.tune(*arrays)
    restart()
    assert gpu.takes_the_favorite(*arrays)
    gpu.name = b"Simulated 100"
    tuned_rows.device_name.cache_clear()
    assert gpu.takes_the_favorite(*arrays)


def stored():
    (entry,) = (entry for entry in cache.ls() if entry.name.startswith("tuned_rows"))
    return entry.name.removesuffix(".json"), json.loads(Path(entry.path).read_text())


def test_rows_that_are_no_longer_in_the_tables_are_ignored(gpu):
    gpu.favorite = favorite_of(gpu)
    arrays = gpu.arrays()
    cuattn.tune(*arrays)
    key, entries = stored()
    for change in ({"block_n": 24}, {"no_such_field": 1}):
        entries[0]["row"] |= change
        cache.write(key, ".json", json.dumps(entries).encode())
        restart()
        assert not gpu.takes_the_favorite(*arrays)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[3]", b"[{}]", b"\xff", b"[" * 100_000, b'[{"table": [], "row": 1}]', b'{"table": 0}', b"7"]
)
def test_what_is_no_table_of_rows_is_ignored(gpu, text):
    gpu.favorite = favorite_of(gpu)
    arrays = gpu.arrays()
    cache.write(tuned_rows._key(), ".json", text)
    restart()
    assert not gpu.takes_the_favorite(*arrays)
    cuattn.tune(*arrays)  # which writes it anew
    restart()
    assert gpu.takes_the_favorite(*arrays)


def test_two_processes_keep_what_both_have_found(gpu):
    """The second has read the cache before the first wrote to it."""
    gpu.favorite = favorite_of(gpu)
    arrays = gpu.arrays()
    assert not gpu.takes_the_favorite(*arrays)  # reads the cache
    key = tuned_rows._key()
    cuattn.tune(*arrays, causal=True)
    _, first = stored()
    cache.write(key, ".json", b"[]")
    restart()
    assert not gpu.takes_the_favorite(*arrays, causal=True)
    cache.write(key, ".json", json.dumps(first).encode())
    cuattn.tune(*arrays)
    restart()
    assert gpu.takes_the_favorite(*arrays) and gpu.takes_the_favorite(*arrays, causal=True)


@pytest.mark.parametrize("gpu", ["sm_90a"], indirect=True)
def test_a_row_of_the_hopper_kernel_is_for_calls_that_it_takes(gpu):
    """Of the same class, but with strides that no tensor map holds."""
    gpu.favorite = favorite_of(gpu)
    cuattn.tune(*gpu.arrays())
    assert not gpu.takes_the_favorite(*gpu.arrays(layout=Layout(pad=(0, 0, 0, 1))))
    assert gpu.takes_the_favorite(*gpu.arrays(layout=Layout(pad=(0, 0, 0, 8))))


@pytest.mark.parametrize("gpu", ["sm_90a"], indirect=True)
def test_a_portable_row_may_be_the_fastest_on_hopper(gpu):
    gpu.favorite = FLASH_FWD_CONFIGS[3]
    cuattn.tune(*gpu.arrays())
    assert gpu.takes_the_favorite(*gpu.arrays())
    assert cuattn.forward_path(*gpu.arrays()).reason == "it was the fastest"


def test_what_cannot_be_measured_is_refused(gpu):
    host = [np.ones(shape, np.float16) for shape in SHAPES]
    with pytest.raises(NotSupportedError, match="measures on a GPU"):
        cuattn.tune(*host)
    with pytest.raises(ArgumentError, match="nothing to compute"):
        cuattn.tune(*gpu.arrays(((1, 300, 8, 64), (1, 0, 2, 64), (1, 0, 2, 64))))
    with pytest.raises(ArgumentError, match="cu_seqlens_q is None"):
        cuattn.tune(*gpu.arrays(), None, np.int32([0, 300]))
    with pytest.raises(cuattn.errors.ShapeError, match="k has head dim"):
        cuattn.tune(*gpu.arrays(((1, 300, 8, 64), (1, 500, 2, 32), (1, 500, 2, 64))))
    assert gpu.launched == [] and not any(entry.name.startswith("tuned") for entry in cache.ls())


def test_a_shape_that_cannot_be_launched_keeps_nothing(gpu, monkeypatch):
    def refuse(self, *launch):
        raise LaunchError("no")

    monkeypatch.setattr(executors.CudaExecutor, "launch", refuse)
    with pytest.raises(LaunchError, match="no"):
        cuattn.tune(*gpu.arrays())
    assert not os.path.exists(cache.root() / f"{tuned_rows._key()}.json")
