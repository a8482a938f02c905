"""What a user would otherwise call: the list of peers, each a plug-in that is used where its library is installed.

A new peer is a line of `PLUGINS` and a function that prepares its call. Which of them a run times is
`Options.peers`: True stands for all that can run on a GPU, names for those alone; one that is not installed is named.

>>> "torch FLASH" in names()
True
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from cuattn.benchmark import array_peers, linear_peers, torch_peers, wheel_peers
from cuattn.benchmark.peer import Peer, PeerError, PeerGrads, Prepare, as_array, to_array, to_torch
from cuattn.errors import ArgumentError

__all__ = [
    "PLUGINS",
    "Peer",
    "PeerError",
    "PeerGrads",
    "Plugin",
    "Wanted",
    "as_array",
    "call_peers",
    "missing",
    "names",
    "of",
    "to_array",
    "to_torch",
]

Wanted = bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A library, or one way into it: what it prepares of "attention", "backward", "softmax" and "linear"."""

    name: str
    module: str  # is to be found
    install: str  # what to give pip
    prepare: Mapping[str, Prepare]
    executors: tuple[str, ...] = ("cuda",)
    waits: bool = False


def _torch(backend: str, *executors: str) -> Plugin:
    name = f"torch {backend.removesuffix('_ATTENTION').replace('CUDNN', 'cuDNN')}"
    prepare = {"attention": torch_peers.sdpa(backend), "backward": torch_peers.sdpa_gradients(backend)}
    return Plugin(name, "torch", "torch", prepare, ("cuda", *executors))


_FLASH_ATTENTION = "https://github.com/Dao-AILab/flash-attention"
PLUGINS = (
    _torch("CUDNN_ATTENTION"),
    _torch("FLASH_ATTENTION"),
    _torch("EFFICIENT_ATTENTION"),
    _torch("MATH", "host"),
    Plugin("torch SDPA", "torch", "torch", {"shapes": torch_peers.sdpa(None)}),
    Plugin("torch FlexAttention", "torch", "torch", {"attention": torch_peers.flex}),
    Plugin("torch", "torch", "torch", {"softmax": torch_peers.softmax}, ("cuda", "host")),
    Plugin("flash-attn 2", "flash_attn", "flash-attn", {"attention": wheel_peers.flash_attn("flash_attn")}),
    Plugin(
        *("flash-attn 3", "flash_attn_interface", f"'git+{_FLASH_ATTENTION}#subdirectory=hopper'"),
        {"attention": wheel_peers.flash_attn("flash_attn_interface")},
    ),
    Plugin(
        *("flash-attn 4", "flash_attn.cute", "--pre flash-attn-4"),
        {"attention": wheel_peers.flash_attn("flash_attn.cute")},
    ),
    Plugin("xformers", "xformers", "xformers", {"attention": wheel_peers.xformers}),
    Plugin("FlashInfer", "flashinfer", "flashinfer-python", {"attention": wheel_peers.flashinfer}),
    Plugin("cuDNN", "cudnn", "nvidia-cudnn-frontend", {"attention": wheel_peers.cudnn}),
    Plugin("JAX", "jax", "jax", {"attention": array_peers.jax_attention}, ("cuda", "host"), waits=True),
    Plugin("fla", "fla", "flash-linear-attention", {"linear": linear_peers.fla}),
    Plugin(
        *("CuPy, unfused", "cupy", "cupy-cuda12x"),
        {"attention": array_peers.cupy_attention, "softmax": array_peers.cupy_softmax},
    ),
    Plugin("NumPy, unfused", "numpy", "numpy", {"attention": array_peers.numpy_attention}, ("host",), waits=True),
    Plugin("SciPy", "scipy", "scipy", {"softmax": array_peers.scipy_softmax}, ("host",), waits=True),
)


def names() -> list[str]:
    """The names of all peers."""
    return [plugin.name for plugin in PLUGINS]


def of(kind: str, wanted: Wanted, executor: str) -> list[Peer]:
    """The peers of a kind of operation that are wanted, installed, and run on an executor.

    On the host executor nothing is a peer unless it is named: times there are no GPU times.
    """
    return [
        Peer(plugin.name, plugin.prepare[kind], plugin.waits or executor == "host")
        for plugin in _wanted(kind, wanted, executor)
        if executor in plugin.executors and _is_installed(plugin)
    ]


def missing(kind: str, wanted: Wanted, executor: str) -> dict[str, str]:
    """Name of each peer that is wanted and cannot be had here to why."""
    found = {}
    for plugin in _wanted(kind, wanted, executor):
        if executor not in plugin.executors:
            found[plugin.name] = "not on a GPU" if executor == "cuda" else "on a GPU only"
        elif not _is_installed(plugin):
            found[plugin.name] = f"not installed: pip install {plugin.install}"
    return found


def _wanted(kind: str, wanted: Wanted, executor: str) -> list[Plugin]:
    if isinstance(wanted, bool):
        chosen = [plugin for plugin in PLUGINS if wanted and executor == "cuda" and "cuda" in plugin.executors]
    else:
        if unknown := set(wanted) - set(names()):
            raise ArgumentError(f"there is no peer {sorted(unknown)[0]!r}: choose from {', '.join(names())}")
        chosen = [plugin for plugin in PLUGINS if plugin.name in wanted]
    return [plugin for plugin in chosen if kind in plugin.prepare]


def _is_installed(plugin: Plugin) -> bool:
    try:
        return importlib.util.find_spec(plugin.module) is not None
    except Exception:  # the package around a module is imported, which may fail in ways of its own
        return False


def call_peers() -> list[Peer]:
    """The peers whose Python is worth timing: torch chooses its back end itself, as its users let it."""
    return [Peer("torch SDPA", torch_peers.sdpa(None))] if importlib.util.find_spec("torch") else []
