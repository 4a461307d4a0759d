"""Plot a recorded run: decode's bandwidth, prefill's rate, what shared prefixes gain.

    python -m benchmarks.plot benchmarks/results/MACHINE/decode.json docs/decode-bandwidth.svg
    python -m benchmarks.plot benchmarks/results/MACHINE/prefill.json docs/prefill-rate.svg
    python -m benchmarks.plot benchmarks/results/MACHINE/cascade.json docs/shared-prefix-speedup.svg

Needs matplotlib, of the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

RecordedRow = dict[str, Any]
Point = tuple[str, float, float]  # the line it is on, and its place


@dataclass(frozen=True)
class Axes:
    """What is drawn of a routine's rows.

    Attributes:
        points: of the lines, in any order.
        x_ticks: numbers at the x axis, which is logarithmic; none: powers of ten.
        y_ticks: numbers at the y axis, which is then logarithmic too.
    """

    points: Callable[[list[RecordedRow]], Iterable[Point]]
    x_label: str
    y_label: str
    title: str
    x_ticks: Sequence[float] = ()
    y_ticks: Sequence[float] = ()


def rates(
    rows: list[RecordedRow],
    cells: str,
    x: Callable[[re.Match[str], RecordedRow], float],
    rate: str,
) -> Iterator[Point]:
    """Yield the rates of every backend.

    Args:
        rows: of one routine.
        cells: the cells, which differ in one thing only; passed to `x` as they match.
        x: the place of a row, from the match and the row.
        rate: the rate in a row.
    """
    for row in rows:
        if match := re.search(cells, row["cell"]):
            yield row["backend"], x(match, row), row[rate]


def speed_ups(rows: list[RecordedRow]) -> Iterator[Point]:
    """Yield how much faster a step is with its prefix shared, a line for each number of requests.

    Cells of which one of the two rows is missing are left out.
    """
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["cell"], {})[row["backend"]] = row["us"]
    found = []
    for cell, of_cell in times.items():
        match = re.search(r"^bs(\d+) shared([1-9]\d*) own256$", cell)
        if match and {"fi_backend", "fi_backend unshared"} <= of_cell.keys():
            ratio = of_cell["fi_backend unshared"] / of_cell["fi_backend"]
            found.append((int(match[1]), float(match[2]), ratio))
    for requests, tokens, ratio in sorted(found, reverse=True):
        yield f"{requests} requests", tokens, ratio


ROUTINES = {
    "decode": Axes(
        points=partial(
            rates,
            cells=r"ctx\d+ hq32 hkv8 d128 p16$",
            x=lambda _, row: row["us"] * row["gbs"] * 1e3,
            rate="gbs",
        ),
        x_label="bytes of K, V, q and output of a call",
        y_label="GB/s, launch included",
        title="decode, bf16, 32/8 heads of 128, page 16",
    ),
    "prefill": Axes(
        points=partial(
            rates,
            cells=r"^bs1 q(\d+) ctx\1 hq32 hkv8 d128 p16 causal1$",
            x=lambda match, _: float(match[1]),
            rate="tflops",
        ),
        x_label="tokens of one request, all of them queries",
        y_label="TFLOP/s, launch included",
        title="prefill, bf16, causal, 32/8 heads of 128, page 16",
    ),
    "cascade": Axes(
        points=speed_ups,
        x_label="tokens of the prefix that all requests share, each with 256 of its own behind",
        y_label="time unshared over shared, plan included",
        title="shared prefix, bf16, 32/8 heads of 128, page 16",
        x_ticks=[1 << power for power in range(9, 16)],
        y_ticks=[0.5, 1, 2, 4, 8, 16],
    ),
}


def series(axes: Axes, rows: list[RecordedRow]) -> dict[str, list[tuple[float, float]]]:
    """Return the points (x, y) of every line, in order of x."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line, x, y in axes.points(rows):
        points.setdefault(line, []).append((x, y))
    return {line: sorted(found) for line, found in points.items()}


def plot(rows: list[RecordedRow], path: Path) -> None:
    """Draw the lines of a routine into `path`, whose suffix says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = ROUTINES[rows[0]["routine"]]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for line, points in series(drawn, rows).items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=4, label=line)
    axes.set_xscale("log")
    if drawn.y_ticks:
        axes.set_yscale("log")
    for axis, ticks in ((axes.xaxis, drawn.x_ticks), (axes.yaxis, drawn.y_ticks)):
        if ticks:
            axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            axis.set_ticks([], minor=True)
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
