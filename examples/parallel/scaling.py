"""How ring, Ulysses and both nested would scale from 8 to 1,024 GPUs, on paper: a table, and a plot.

python -m examples.parallel.scaling --plot scaling.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cuattn import estimate

RANKS = tuple(2**i for i in range(3, 11))
METHODS = ("ring", "ulysses", "usp")
CALL: dict[str, Any] = {"seqlen": 2**20, "heads": 64, "kv_heads": 8, "head_dim": 128}


def table(**rates: Any) -> dict[str, list[estimate.Scaling]]:
    """Return the estimates of each method for all numbers of ranks."""
    return {method: [estimate.scaling(ranks, method=method, **CALL, **rates) for ranks in RANKS] for method in METHODS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=600e12, help="FLOP/s that kernels reach (600e12)")
    parser.add_argument("--link", type=float, default=400e9, help="bytes/s of a GPU inside a node (400e9)")
    parser.add_argument("--network", type=float, default=50e9, help="bytes/s of a GPU out of its node (50e9)")
    parser.add_argument("--plot", type=Path, help="where to save a plot (needs matplotlib)")
    options = parser.parse_args()
    rates = {
        "flops_per_s": options.flops,
        "link_bytes_per_s": options.link,
        "network_bytes_per_s": options.network,
    }
    found = table(**rates)
    print(f"causal attention, {', '.join(f'{name} {x}' for name, x in CALL.items())}, 2 bytes; nodes of 8 GPUs;")
    print("assumed: " + ", ".join(f"{name} {x:.3g}" for name, x in rates.items()))
    print((estimate.scaling.__globals__["__doc__"] or "").partition("What is assumed: ")[2].strip())
    print(f"\n{'ranks':>6}" + "".join(f"{method:>12}" for method in METHODS) + "   efficiency; * transfers are hidden")
    for row in zip(*found.values(), strict=True):
        cells = (f"{x.efficiency:11.3f}{'*' if x.hidden else ' '}" for x in row)
        print(f"{row[0].ranks:6}" + "".join(cells))
    for name, rate in (("link", options.link), ("network", options.network)):
        heads = {key: CALL[key] for key in ("heads", "kv_heads")}
        tokens = estimate.ring_hides_from(**heads, flops_per_s=options.flops, bytes_per_s=rate)
        print(f"a ring over the {name} hides its transfers from {tokens:,.0f} tokens a rank")
    if options.plot is not None:
        plot(found, options.plot)


def plot(found: dict[str, list[estimate.Scaling]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for method, rows in found.items():
        axes.plot([x.ranks for x in rows], [x.efficiency for x in rows], marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(x) for x in RANKS])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("efficiency, estimated")
    axes.set_title("causal attention over 1 Mi tokens, 64 heads, 8 key/value heads of 128: an estimate")
    axes.title.set_fontsize(9)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
