"""Which instructions are younger than sm_80.

NVRTC passes inline assembly on unseen and ptxas refuses what the target does not have, so the host executor refuses it
too: a kernel that runs here must also assemble.
"""

from __future__ import annotations

from functools import lru_cache

_BF16 = frozenset({"bf16", "bf16x2"})
_FP8 = frozenset({"e4m3x2", "e5m2x2"})
_PAIRS = frozenset({"u16x2", "s16x2"})


# Outside arithmetic: the opcode, modifiers that must all be there, the first target.
_YOUNGER: tuple[tuple[str, frozenset[str], int], ...] = (
    ("stmatrix", frozenset(), 90), ("elect", frozenset(), 90), ("griddepcontrol", frozenset(), 90),
    ("atom", frozenset({"v2"}), 90), ("red", frozenset({"v2"}), 90), ("cp", frozenset({"bulk"}), 90),
    ("mapa", frozenset(), 90), ("getctarank", frozenset(), 90), ("barrier", frozenset({"cluster"}), 90),
    ("fence", frozenset({"async"}), 90), ("fence", frozenset({"mbarrier_init"}), 90),
    ("fence", frozenset({"cluster"}), 90),
    ("mbarrier", frozenset({"try_wait"}), 90), ("mbarrier", frozenset({"expect_tx"}), 90),
    ("mbarrier", frozenset({"complete_tx"}), 90), ("mbarrier", frozenset({"cluster"}), 90),
    ("mbarrier", frozenset({"shared::cluster"}), 90), ("mbarrier", frozenset({"relaxed"}), 90),
    ("cp", frozenset({"reduce"}), 90),
)  # fmt: skip

# Instructions of one architecture alone.
_ARCH_SPECIFIC = {"wgmma": ("sm_90a",), "setmaxnreg": ("sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")}


def arch_specific_targets(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the targets that have the instruction, when it belongs to few of them; else nothing."""
    return _ARCH_SPECIFIC.get(parts[0], ())


@lru_cache(maxsize=4096)
def oldest_target(parts: tuple[str, ...]) -> int:
    """Return the compute capability, times ten, of the first GPU with the instruction ``parts``; at least 80."""
    base, names = parts[0], set(parts[1:])
    for opcode, modifiers, oldest in _YOUNGER:
        if opcode == base and modifiers <= names:
            return oldest
    if base == "cvt":
        return _oldest_cvt(parts, names)
    if names & _BF16 and base in ("add", "sub", "mul", "setp", "set", "ex2", "tanh"):
        return 90  # before, bf16 had fma, min, max, neg and abs only
    if names & _PAIRS and base in ("add", "min", "max"):
        return 90
    return 86 if "xorsign" in names else 80


def _oldest_cvt(parts: tuple[str, ...], names: set[str]) -> int:
    if names & _FP8:
        return 89
    if "tf32" in names:
        return 80 if "rna" in names else 90
    if "bf16" in names:
        # Only rounding an f32, and the way back, are old.
        return 80 if parts[-2:] in (("bf16", "f32"), ("f32", "bf16")) and not names & {"rm", "rp"} else 90
    return 80
