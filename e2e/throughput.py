"""Token throughput of a real engine with our backend and with its own, side by side.

    python -m e2e.throughput --engine vllm

All engines of a model run all the time and take the same batch in turn, so that they see the same
machine; on a GPU they share its memory in equal parts. A batch is the same work for all of them and
other load only adds to it, so an engine's time is its best; engines start anew, because two
processes of one engine differ by several percent. A row is the median of the starts. JSON goes to
benchmarks/results/<machine>/e2e_vllm.json.

On a GPU the models are dummy weights in the shapes of Llama-3.1-8B and Llama-3.2-1B, and the peers
FLASH_ATTN and, where it is installed, FLASHINFER. A minute or two of one cell:

    python -m e2e.throughput --workloads "8B bf16 decode-heavy" --backends FLASH_ATTN --rounds 1

Shared prefixes with the switch on and off, and in how many texts tokens are the same:

    python -m e2e.throughput --workloads "1B bf16 shared" tree --also FI_BACKEND_SHARED_PREFIX=0

With --trace FILE another round is watched: GPU kernels by name, the GPU's idle time, and what our
part and the peer's take of the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import commit, machine_name, results_path
from e2e import workloads
from e2e.served import Answer, Child, Engine, serve
from e2e.step_trace import render
from e2e.workloads import Model, Workload
from fi_backend import env

OURS = "fi_backend"
Measured = tuple[str, list[dict[str, Any]]]  # a workload's name and rows


@dataclass(frozen=True)
class Backend:
    """A backend as a user asks for it, and the environment of its engine."""

    name: str | None
    environment: tuple[tuple[str, str], ...] = ()


def chosen_peers(peers: dict[str, Backend], wanted: Sequence[str]) -> dict[str, Backend]:
    """Return those peers that `wanted` names, all where it names none.

    Raises:
        SystemExit: it names another.
    """
    unknown = sorted(set(wanted) - set(peers))
    if unknown:
        raise SystemExit(f"--backends must be of {', '.join(peers)}; got {', '.join(unknown)}")
    return {name: peer for name, peer in peers.items() if not wanted or name in wanted}


def backends(wanted: Sequence[str]) -> dict[str, Backend]:
    """Return ours and the peers, those in `wanted` if it names any."""
    peers = {"stock": Backend(None)}
    if torch.cuda.is_available():
        peers = {
            "FLASH_ATTN": Backend("FLASH_ATTN"),
            # By this name an engine gets us, unless we stand aside.
            "FLASHINFER": Backend("FLASHINFER", (("FI_BACKEND_DISABLE", "1"),)),
        }
    chosen = chosen_peers(peers, wanted)
    if "FLASHINFER" in chosen and importlib.util.find_spec("flashinfer") is None:
        del chosen["FLASHINFER"]
        print("FLASHINFER is not measured: there is no flashinfer package", flush=True)
    return {OURS: Backend("flashinfer"), **chosen}


def is_ours(name: str) -> bool:
    """Whether an engine of this name runs our backend: with the settings of all, or one more."""
    return name.partition(" ")[0] == OURS


def with_setting(contenders: dict[str, Backend], setting: str) -> dict[str, Backend]:
    """Add ours once more with another variable of the environment, as NAME=VALUE, if there is one.

    Raises:
        SystemExit: `setting` has no value.
    """
    if not setting:
        return contenders
    variable, equals, value = setting.partition("=")
    if not equals:
        raise SystemExit(f"--also must be NAME=VALUE; got {setting}")
    more = dataclasses.replace(contenders[OURS], environment=((variable, value),))
    return {OURS: contenders[OURS], f"{OURS} {setting}": more, **contenders}


def start_vllm(
    model: Model, contenders: dict[str, Backend], directory: Path, *, quick: bool
) -> dict[str, Child]:
    """Start an engine for each backend, all at once; leave out peers that do not start."""
    began = time.monotonic()
    starting = {
        name: Engine(
            model.folder(directory),
            model.dtype,
            backend.name,
            model.arguments(len(contenders), gpu_bytes()),
            directory / f"{name}.log",
            dict(backend.environment),
            compiles=torch.cuda.is_available() and not quick,
        )
        for name, backend in contenders.items()
    }
    return started(starting, began)


def gpu_bytes() -> int:
    """Memory of the GPU; 0 without one."""
    on_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_properties(0).total_memory if on_gpu else 0


def started(starting: Mapping[str, Child], began: float) -> dict[str, Child]:
    """Wait for engines that start since `began`; leave out peers that do not.

    Raises:
        RuntimeError: ours does not.
    """
    engines = {}
    for name, engine in starting.items():
        try:
            engine.wait()
        except RuntimeError as error:
            if name == OURS:
                for other in starting.values():
                    other.close()
                raise
            print(f"{name} is not measured: {error}", flush=True)
            continue
        engines[name] = engine
        print(f"  {name} ready after {time.monotonic() - began:.0f} s", flush=True)
    return engines


def best_answers(
    engines: Mapping[str, Child], workload: Workload, rounds: int, most_seconds: float
) -> dict[str, Answer]:
    """Run the rounds in all engines in turn; return each one's first answer, in its best time.

    No round begins once ours has worked for `most_seconds`.
    """
    answers: dict[str, list[Answer]] = {name: [] for name in engines}
    for number in range(rounds):
        for name, engine in engines.items():
            answers[name].append(engine.run(workload, number))
        seconds = (
            f"{name} {of_engine[-1]['seconds']:.2f} s" for name, of_engine in answers.items()
        )
        print(f"  {workload.label}: {', '.join(seconds)}", flush=True)
        if sum(answer["seconds"] for answer in answers[OURS]) > most_seconds:
            break
    for name, of_engine in answers.items():
        if bool(of_engine[-1]["counters"]["attention_runs"]) != is_ours(name):
            raise RuntimeError(f"{name}: another backend has served: {of_engine[-1]['counters']}")
    return {
        name: {**of_engine[0], "seconds": min(answer["seconds"] for answer in of_engine)}
        for name, of_engine in answers.items()
    }


def report(workload: Workload, starts: list[dict[str, Answer]]) -> list[dict[str, Any]]:
    """Print a line, and return a row for each backend, from what each start of engines gave."""
    others = [name for name in starts[0] if name != OURS]
    peers = [name for name in others if not is_ours(name)]
    best = [min((run[name]["seconds"] for name in peers), default=0.0) for run in starts]
    ratios = {
        name: statistics.median(
            stock / run[name]["seconds"] for stock, run in zip(best, starts, strict=True)
        )
        for name in starts[0]
        if is_ours(name)
    }
    rows = []
    for name in starts[0]:
        seconds = statistics.median(answers[name]["seconds"] for answers in starts)
        rows.append(
            {
                "cell": workload.name,
                "backend": name,
                "us": seconds * 1e6,
                "out_tps": sum(map(len, starts[-1][name]["tokens"])) / seconds,
                "tps_over_stock": ratios.get(name, 1.0),
            }
        )
    speeds = "  ".join(f"{row['backend']} {row['out_tps']:.0f}" for row in rows)
    mine = starts[-1][OURS]["tokens"]
    same = [
        sum(a == b for a, b in zip(mine, starts[-1][name]["tokens"], strict=True))
        for name in others
    ]
    print(
        f"{workload.name:60} {speeds} tok/s  {ratios[OURS]:5.3f}x  "
        f"same tokens in {', '.join(map(str, same))} of {len(mine)} texts",
        flush=True,
    )
    return rows


def trace(engines: Mapping[str, Child], workload: Workload, number: int, path: Path) -> None:
    """Run another round in each engine; print what its steps consist of, and add it to a file."""
    print(f"steps of {workload.name}:")
    traces = json.loads(path.read_text()) if path.exists() else {}
    for name, engine in engines.items():
        found = engine.run(workload, number, "traced")["trace"]
        traces[f"{workload.name}, {name}"] = found
        print(render(name, found), flush=True)
    path.write_text(json.dumps(traces, indent=1) + "\n")


def measure(
    chosen: Sequence[Workload],
    start: Callable[[Path], dict[str, Child]],
    arguments: argparse.Namespace,
    *,
    note: str = "",
    trace_file: Path | None = None,
) -> Iterator[Measured]:
    """Run workloads of one model; yield the name and rows of each as it is done.

    With several starts a workload comes up again, with rows of all starts so far.

    Args:
        chosen: what to run.
        start: starts the engines of all backends, with a folder for what they write.
        arguments: those of options().
        note: added to the labels of the workloads.
        trace_file: watch another round of each workload, and add what is found to this file.
    """
    results: dict[str, list[dict[str, Answer]]] = {workload.name: [] for workload in chosen}
    for _ in range(arguments.starts):
        with tempfile.TemporaryDirectory() as directory:
            engines = start(Path(directory))
            try:
                for engine in engines.values():
                    engine.warm_up(chosen[0])
                for workload in chosen:
                    answers = best_answers(
                        engines, workload, arguments.rounds, arguments.most_seconds
                    )
                    results[workload.name].append(answers)
                    shown = dataclasses.replace(workload, label=workload.label + note)
                    yield shown.name, report(shown, results[workload.name])
                    if trace_file is not None:
                        trace(engines, workload, arguments.rounds, trace_file)
            finally:
                for engine in engines.values():
                    engine.close()


def options(starts: int) -> argparse.ArgumentParser:
    """Return the options of every engine's run, to be a parser's parent.

    Args:
        starts: of all engines, where the command line says nothing.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--workloads", nargs="+", default=[""], help="only those whose name has one of these texts"
    )
    parser.add_argument("--backends", default="", help="only these peers, with commas between")
    parser.add_argument(
        "--also", default="", metavar="NAME=VALUE", help="ours again, with this in its environment"
    )
    parser.add_argument("--starts", type=int, default=starts, help="starts of all engines")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2 if torch.cuda.is_available() else 5,
        help="batches for each engine and start",
    )
    parser.add_argument(
        "--most-seconds", type=float, default=math.inf, help="no further round after that many"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser


def chosen_models(texts: Sequence[str]) -> Iterator[list[Workload]]:
    """Yield the workloads of each model whose names have one of these texts."""
    every = workloads.GPU if torch.cuda.is_available() else workloads.CPU
    named = {
        workload.name: workload for text in texts for workload in every if text in workload.name
    }
    for _, of_model in itertools.groupby(named.values(), key=lambda workload: id(workload.model)):
        yield list(of_model)


def record_all(measured: Iterable[Measured], path: Path | None, **conditions: Any) -> None:
    """Write the rows of all workloads after each of them: a run that is cut short keeps some."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, found in measured:
        rows[name] = found
        if path is not None:
            record(itertools.chain.from_iterable(rows.values()), path, **conditions)


def record(rows: Iterable[dict[str, Any]], path: Path, **conditions: Any) -> None:
    """Write rows, with the conditions they were measured under."""
    conditions |= {
        "gpu": machine_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "shared_prefix": env.SHARED_PREFIX.get(),  # None: as the engine says
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**row, **conditions} for row in rows], indent=1) + "\n")


def main() -> None:
    """Parse the command line, run the workloads, record the rows."""
    on_gpu = torch.cuda.is_available()
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    chosen_engine, rest = chooser.parse_known_args()
    if chosen_engine.engine == "sglang":
        from e2e import sglang_throughput

        sglang_throughput.main(rest)
        return
    parser = argparse.ArgumentParser(
        prog="python -m e2e.throughput",
        description=__doc__,
        parents=[chooser, options(1 if on_gpu else 3)],
    )
    parser.add_argument("--quick", action="store_true", help="no torch.compile: starts sooner")
    parser.add_argument("--trace", type=Path, help="print what steps consist of; more in this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(sys.stdin)
        return
    wanted = [name for name in arguments.backends.split(",") if name]
    contenders = with_setting(backends(wanted), arguments.also)
    print(f"vLLM on {machine_name()}; ratio: ours over the best peer", flush=True)
    path = None if arguments.no_write else arguments.output or results_path("e2e_vllm")
    compiled = on_gpu and not arguments.quick
    measured = (
        measure(
            chosen,
            partial(start_vllm, chosen[0].model, contenders, quick=arguments.quick),
            arguments,
            trace_file=arguments.trace,
        )
        for chosen in chosen_models(arguments.workloads)
    )
    rows = itertools.chain.from_iterable(measured)
    record_all(rows, path, routine="e2e_vllm", torch_compile=compiled)


if __name__ == "__main__":
    main()
