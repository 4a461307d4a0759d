"""Plot a recorded decode run: bandwidth reached against the bytes that a call must move.

    python -m benchmarks.plot benchmarks/results/MACHINE/decode.json docs/decode-bandwidth.svg

Needs matplotlib, of the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return (bytes of a call, GB/s) by backend, in order of bytes; one head layout and cache."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if re.search(r"ctx\d+ hq32 hkv8 d128 p16$", row["cell"]):
            num_bytes = row["us"] * row["gbs"] * 1e3
            points.setdefault(row["backend"], []).append((num_bytes, row["gbs"]))
    return {backend: sorted(found) for backend, found in points.items()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the points of every backend into `path`, whose suffix says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for backend, points in series(rows).items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=4, label=backend)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of K, V, q and output of a call")
    axes.set_ylabel("GB/s, launch included")
    axes.set_title(f"decode, bf16, 32/8 heads of 128, page 16, {rows[0]['gpu']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    plot(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.output)


if __name__ == "__main__":
    main()
