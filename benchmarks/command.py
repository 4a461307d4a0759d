"""One case of `python -m benchmarks`: bind its backends, compare them with torch, time them."""

from __future__ import annotations

import argparse
import functools
import importlib
import shlex
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.report import commit, machine_name
from benchmarks.routines import ROUTINES, Options, Routine
from benchmarks.routines.routine import Bound
from benchmarks.timing import interleaved
from fi_backend.testing import bench_gpu_time

__all__ = ["Case", "Result", "run_case"]

# A result may differ from the reference's by this much of 1 plus its size: some units in the last
# place of the dtype, for a result that went through sums in another order.
_TOLERANCES = {
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
    torch.float8_e4m3fn: 0.13,  # one step of 3 mantissa bits
    torch.float8_e5m2: 0.26,
    torch.int8: 1.0,
}
_CPU_SECONDS = 0.2
# What a backend raises that is missing, or does not serve a case: the others go on.
_PROBLEMS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Case:
    """A routine with its options, and how to run it."""

    routine: Routine
    options: Options
    backends: tuple[str, ...]
    refcheck: bool
    allow_output_mismatch: bool
    num_iters: int | None
    dry_run_iters: int | None
    use_cuda_graph: bool
    use_cupti: bool
    random_seed: int
    case_tag: str
    output_path: Path | None
    shows_command: bool

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Case:
        """Take a case from parsed options.

        Those that are left out have the defaults of Options, but values are like keys, and a cache
        is like q.
        """
        given = {field.name: getattr(arguments, field.name) for field in fields(Options)}
        given = {name: value for name, value in given.items() if value is not None}
        given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        for name, other in (("head_dim_vo", "head_dim_qk"), ("kv_dtype", "q_dtype")):
            if other in given:
                given.setdefault(name, given[other])
        return cls(
            routine=ROUTINES[arguments.routine],
            options=Options(**given),
            backends=tuple(arguments.backends),
            refcheck=arguments.refcheck,
            allow_output_mismatch=arguments.allow_output_mismatch,
            num_iters=arguments.num_iters,
            dry_run_iters=arguments.dry_run_iters,
            use_cuda_graph=not arguments.no_cuda_graph,
            use_cupti=arguments.use_cupti,
            random_seed=arguments.random_seed,
            case_tag=arguments.case_tag,
            output_path=arguments.output_path,
            shows_command=arguments.generate_repro_command,
        )

    def command(self, backend: str) -> str:
        """Return the command that runs this case again, with one backend."""
        words = ["python", "-m", "benchmarks", "--routine", self.routine.name]
        words += ["--backends", backend, "--random_seed", str(self.random_seed)]
        for name, value in asdict(self.options).items():
            if value is True:
                words.append(f"--{name}")
            elif value is not False and (name in self.routine.used or name == "device"):
                words += [f"--{name}", str(value)]
        return shlex.join([*words, *["--refcheck"] * self.refcheck])


@dataclass(frozen=True)
class Result:
    """What one backend did: times in ms, or why there are none."""

    case: Case
    backend: str
    times: tuple[float, ...] = ()
    work: tuple[int, int] = (0, 0)
    max_error: float | None = None
    is_right: bool = True
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether this makes the command fail."""
        return bool(self.problem) or not (self.is_right or self.case.allow_output_mismatch)

    def columns(self) -> dict[str, object]:
        """Return the row of the CSV file."""
        used = {*self.case.routine.used, "device"}
        options = {name: v for name, v in asdict(self.case.options).items() if name in used}
        row: dict[str, object] = {
            "routine": self.case.routine.name,
            "backend": self.backend,
            "resolved_backend": self.backend,
            **options,
            "random_seed": self.case.random_seed,
            "refcheck": self._verdict(),
            "max_error": "" if self.max_error is None else f"{self.max_error:.3e}",
            **_conditions(),
            "case_tag": self.case.case_tag,
            "repro_command": self.case.command(self.backend) if self.case.shows_command else "",
        }
        if self.times:
            median = statistics.median(self.times)
            moved, operations = self.work
            row |= {
                "median_time": f"{median:.6f}",
                "std_time": f"{statistics.pstdev(self.times):.6f}",
                "tb_per_sec": f"{moved / median * 1e-9:.4f}",
                "tflops": f"{operations / median * 1e-9:.4f}" if operations else "",
            }
        return row

    def text(self) -> str:
        """Return the line to print."""
        row = self.columns()
        parts = [f"{row['routine']:38} {self.backend:16}"]
        if self.problem:
            parts.append(self.problem)
        else:
            parts.append(f"{float(str(row['median_time'])) * 1e3:10.1f} us")
            parts.append(f"{row['tb_per_sec']:>8} TB/s")
            parts.append(f"{row['tflops']:>9} TFLOP/s" if row["tflops"] else "")
        if self.max_error is not None:
            parts.append(f"max error {row['max_error']}: {row['refcheck']}")
        command = str(row["repro_command"])
        return "  ".join(filter(None, parts)) + (f"\n  {command}" if command else "")

    def _verdict(self) -> str:
        if self.problem:
            return self.problem
        if self.max_error is None:
            return ""
        return "passed" if self.is_right else "FAILED"


def run_case(case: Case) -> list[Result]:
    """Run a case on all its backends; print nothing."""
    results: dict[str, Result] = {}
    bound: dict[str, Bound] = {}
    for backend in case.backends:
        try:
            with torch.device(case.options.device):
                results[backend], bound[backend] = _bind_and_check(case, backend)
        except _PROBLEMS as error:
            results[backend] = Result(case, backend, problem=_first_line(error))
    if case.options.device == "cpu":
        for backend, times in _cpu_times(case, bound).items():
            results[backend] = replace(results[backend], times=times)
        return list(results.values())
    for backend, call in bound.items():
        try:
            results[backend] = replace(results[backend], times=_cuda_times(case, call))
        except _PROBLEMS as error:
            results[backend] = replace(results[backend], problem=_first_line(error))
    return list(results.values())


@functools.lru_cache(maxsize=1)
def _conditions() -> dict[str, str]:
    return {"machine": machine_name(), "commit": commit()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _bind_and_check(case: Case, backend: str) -> tuple[Result, Bound]:
    """Bind a backend to inputs of its own, which it may overwrite, and check its first result."""
    torch.manual_seed(case.random_seed)
    inputs = case.routine.make(case.options)
    expected = case.routine.expected(inputs) if case.refcheck else ()
    package, _, within = backend.partition(":")
    bound = case.routine.bind(importlib.import_module(package), inputs, within or "auto")
    outputs = bound.function(*bound.arguments)
    checks = [_compare(*pair) for pair in zip(outputs, expected, strict=False)]
    result = Result(
        case,
        backend,
        work=case.routine.work(case.options, inputs),
        max_error=max((error for error, _ in checks), default=None),
        is_right=all(right for _, right in checks),
    )
    return result, bound


def _compare(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, bool]:
    """Return the largest difference, and whether every element is near enough."""
    tolerance = _TOLERANCES[expected.dtype]
    difference = (actual.float() - expected.float()).abs()
    # Equal infinities differ by NaN.
    difference = difference.masked_fill(actual.float() == expected.float(), 0.0)
    is_right = bool((difference <= tolerance * (1 + expected.float().abs())).all())
    return float(difference.max()) if difference.numel() else 0.0, is_right


def _cuda_times(case: Case, call: Bound) -> tuple[float, ...]:
    times = bench_gpu_time(
        call.function,
        case.dry_run_iters,
        case.num_iters,
        enable_cupti=case.use_cupti,
        use_cuda_graph=case.use_cuda_graph,
        input_args=call.arguments,
    )
    return tuple(times)


def _cpu_times(case: Case, bound: dict[str, Bound]) -> dict[str, tuple[float, ...]]:
    """Time all backends in turn; graphs, CUPTI and dry runs are a GPU's."""

    def call(one: Bound) -> Callable[[], object]:
        return lambda: one.function(*one.arguments)

    if not bound:
        return {}
    functions = {backend: call(one) for backend, one in bound.items()}
    seconds = 0.0 if case.num_iters else _CPU_SECONDS
    times = interleaved(functions, seconds=seconds, min_rounds=case.num_iters or 5)
    return {backend: tuple(t * 1e3 for t in values) for backend, values in times.items()}
