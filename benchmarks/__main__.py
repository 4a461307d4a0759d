"""Check and time public calls, by the routines and options of FlashInfer's benchmark.

    python -m benchmarks --routine rmsnorm --batch_size 64 --hidden_size 4096 --refcheck
    python -m benchmarks --testlist cases.txt --csv results.csv

A backend is fi_backend, or flashinfer with one of its own behind a colon, as in flashinfer:fa2. A
testlist has the options of one case on every line; # begins a comment. The exit status is 1 where a
case fails or its result is not the reference's.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.command import Case, run_case
from benchmarks.csv_file import append_rows
from benchmarks.routines import ROUTINES, Options

# Options that mean the same under another name in FlashInfer's benchmark.
_ALIASES = {"q_dtype": ("--input_dtype",), "head_dim_qk": ("--head_dim",)}


def _parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__, formatter_class=text)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--routine", choices=sorted(ROUTINES))
    what.add_argument("--testlist", type=Path, help="file with the options of a case on each line")
    parser.add_argument("--backends", nargs="+", default=["fi_backend"], metavar="BACKEND")
    parser.add_argument("--refcheck", action="store_true", help="compare with a reference in torch")
    parser.add_argument(
        "--allow_output_mismatch", action="store_true", help="a wrong result is no failure"
    )
    parser.add_argument("--num_iters", type=int, help="timed calls; default: as many as fill 0.1 s")
    parser.add_argument("--dry_run_iters", type=int, help="untimed calls before")
    parser.add_argument(
        "--no_cuda_graph", action="store_true", help="time calls outside of a graph"
    )
    parser.add_argument("--use_cupti", action="store_true", help="time kernels, with cupti-python")
    parser.add_argument("--random_seed", type=int, default=42)
    parser.add_argument("--case_tag", default="", help="text for the column of this name")
    parser.add_argument("--generate_repro_command", action="store_true", help="print commands")
    parser.add_argument("--output_path", "--csv", type=Path, help="CSV file that rows are added to")
    shape = parser.add_argument_group("options of the case; a routine takes those that it knows")
    for field in fields(Options):
        names = (f"--{field.name}", *_ALIASES.get(field.name, ()))
        if isinstance(field.default, bool):
            shape.add_argument(*names, action="store_true")
        else:
            kind = type(field.default)
            shape.add_argument(*names, type=kind, default=None, help=f"default: {field.default}")
    return parser


def _cases(arguments: Sequence[str]) -> Iterator[Case]:
    """Parse a command line into cases: one, or one for every line of its testlist."""
    parser = _parser()
    outer = parser.parse_args(arguments)
    if outer.testlist is None:
        yield Case.from_arguments(outer)
        return
    try:
        lines = outer.testlist.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        parser.error(str(error))
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield Case.from_arguments(parser.parse_args(words, copy.copy(outer)))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    failed = 0
    for case in _cases(arguments):
        rows = run_case(case)
        for row in rows:
            print(row.text(), flush=True)
        if case.output_path is not None:
            append_rows(case.output_path, [row.columns() for row in rows])
        failed += sum(row.failed for row in rows)
    if failed:
        print(f"{failed} results are wrong or missing", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
