"""How much machine code a change of the attention kernels gives or takes: instructions, registers and spills by row.

    python -m bench.sass_sizes --record sizes.json                # all of them: 15 minutes
    python -m bench.sass_sizes --record sizes.json --only 'attention_decode*' --every 7
    python -m bench.sass_sizes --compare before.json after.json   # what both have; exits with 1 above the limits

A row of a table of shapes is compiled plain, causal, with one option (which one follows from the place in the table, so
that all have their turn), and with everything that it is meant for. `tile` counts the instructions of an iteration of
the main loop, on its shortest way; what an option adds behind a branch is in `instructions`, of the whole kernel.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cuattn import compile
from cuattn.benchmark import inspected, variants
from cuattn.compile import sass
from cuattn.ops.attention.backward import kernels as backward
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.ops.attention.forward import kernels as forward
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.registry import ARCHS, TYPICAL_DTYPE, Variant

Sizes = dict[str, dict[str, int]]
SINGLE = tuple(ForwardOptions(**{name: True}) for name in ("softcap", "alibi", "bias", "mask", "dropout"))  # type: ignore[arg-type]
LIMIT_PERCENT = 1.0


def kernels() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, source and constants of every variant that is measured."""
    for variant in _with_one_option():
        if not variant.label.endswith("_unaligned"):
            yield variant.label, variant.kernel, {**variant.constants}
    names = ("attention_forward_hopper/*", "attention_plain/*", "attention_standard/*", "attention_mask_tiles/*")
    for one in inspected.everything():
        if any(fnmatch.fnmatchcase(one.name, name) for name in names):
            yield one.name.replace("/", "_"), one.kernel, {**one.constants}


def _with_one_option() -> Iterator[Variant]:
    yield from variants.all_attention()
    for index, row in enumerate(FLASH_FWD_CONFIGS):
        if row.score_options:
            yield forward.variant_of(row, TYPICAL_DTYPE[row.itemsize], SINGLE[index % len(SINGLE)])
    index = 0
    for row in FLASH_BWD_CONFIGS:
        for launch in backward.launches_of(row) if row.score_options else ():
            yield backward.variant_of(row, launch, SINGLE[index % len(SINGLE)])
            index += 1


def measure(source: str, constants: dict[str, Any], arch: str) -> Sizes:
    """Return the sizes of each variant by its entry name."""
    reports = sass.inspect(compile.build(source, constants, arch=arch, kind="cubin"))
    found: Sizes = {}
    for entry, report in reports.items():
        figures = report.resources
        assert figures is not None
        found[entry] = {
            "instructions": report.instructions,
            "tile": report.main.instructions,
            "registers": figures.registers,
            "spills": figures.spill_stores + figures.spill_loads + figures.stack_bytes,
        }
    return found


def record(path: Path, only: str, every: int) -> None:
    sizes: Sizes = {}
    chosen = [one for one in kernels() if fnmatch.fnmatchcase(one[0], only)][::every]
    for number, (name, source, constants) in enumerate(chosen):
        limit = constants.get("SMEM_BYTES", 0)
        for arch in ("sm_90a",) if source.endswith("hopper") else ARCHS:
            if limit <= compile.smem_limit_bytes(arch):
                for entry, figures in measure(source, constants, arch).items():
                    sizes[f"{name} {entry.removeprefix('cuattn_')} {arch}"] = figures
        if number % 20 == 0:
            print(f"{number}/{len(chosen)}", file=sys.stderr, flush=True)
        path.write_text(json.dumps(sizes, indent=1) + "\n")


def compare(before: Sizes, after: Sizes) -> bool:
    """Print what differs, and a summary for each source; whether every change is within the limits."""
    good = True
    groups: dict[str, list[tuple[float, float, int]]] = {}
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        change, tile = (100.0 * (new[key] / old[key] - 1.0) for key in ("instructions", "tile"))
        entry, arch = name.split()[1:]
        groups.setdefault(f"{entry} {arch}", []).append((change, tile, new["registers"] - old["registers"]))
        bad = max(change, tile) > LIMIT_PERCENT or new["spills"] > old["spills"]
        good &= not bad
        if bad:
            print(f"{name}: {old} -> {new} ({change:+.2f} %, tile {tile:+.2f} %)")
    print("kernel | variants | equal | instructions % min .. max, mean | tile % min .. max | registers min .. max")
    for group, found in groups.items():
        changes, tiles, registers = zip(*found, strict=True)
        equal = sum(change == tile == 0.0 for change, tile in zip(changes, tiles, strict=True))
        print(
            f"{group} | {len(found)} | {equal} | {min(changes):+.2f} .. {max(changes):+.2f}, "
            f"{sum(changes) / len(changes):+.2f} | {min(tiles):+.2f} .. {max(tiles):+.2f} | "
            f"{min(registers):+d} .. {max(registers):+d}"
        )
    spilling = [name for name, figures in after.items() if figures["spills"]]
    print(f"{len(after)} after, of which spill: {spilling or 'none'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the names of variants")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one variant of N")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record, arguments.only, arguments.every)
    if arguments.compare:
        before, after = (json.loads(path.read_text()) for path in arguments.compare)
        return not compare(before, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
