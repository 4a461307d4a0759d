"""Plot a recorded run: decode's bandwidth against bytes, prefill's rate against length.

    python -m benchmarks.plot benchmarks/results/MACHINE/decode.json docs/decode-bandwidth.svg
    python -m benchmarks.plot benchmarks/results/MACHINE/prefill.json docs/prefill-rate.svg

Needs matplotlib, of the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Axes:
    """What is drawn of a routine's rows.

    Attributes:
        cells: the cells, which differ in one thing only; passed to `x` as they match.
        x: the place of a row, from the match and the row.
        rate: the rate in a row.
    """

    cells: str
    x: Callable[[re.Match[str], dict[str, Any]], float]
    rate: str
    x_label: str
    y_label: str
    title: str


ROUTINES = {
    "decode": Axes(
        cells=r"ctx\d+ hq32 hkv8 d128 p16$",
        x=lambda _, row: row["us"] * row["gbs"] * 1e3,
        rate="gbs",
        x_label="bytes of K, V, q and output of a call",
        y_label="GB/s, launch included",
        title="decode, bf16, 32/8 heads of 128, page 16",
    ),
    "prefill": Axes(
        cells=r"^bs1 q(\d+) ctx\1 hq32 hkv8 d128 p16 causal1$",
        x=lambda match, _: float(match[1]),
        rate="tflops",
        x_label="tokens of one request, all of them queries",
        y_label="TFLOP/s, launch included",
        title="prefill, bf16, causal, 32/8 heads of 128, page 16",
    ),
}


def series(axes: Axes, rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return the points (x, rate) of every backend, in order of x."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if match := re.search(axes.cells, row["cell"]):
            points.setdefault(row["backend"], []).append((axes.x(match, row), row[axes.rate]))
    return {backend: sorted(found) for backend, found in points.items()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the points of every backend into `path`, whose suffix says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = ROUTINES[rows[0]["routine"]]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for backend, points in series(drawn, rows).items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=4, label=backend)
    axes.set_xscale("log")
    axes.set_xlabel(drawn.x_label)
    axes.set_ylabel(drawn.y_label)
    axes.set_title(f"{drawn.title}, {rows[0]['gpu']}")
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
