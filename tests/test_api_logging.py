"""The API call log: what it writes and when, and that it costs nothing where it is off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fi_backend
from fi_backend.api_logging import ApiLog
from fi_backend.planning import Plan

Record = Callable[..., str]


def scale(x: torch.Tensor, factor: float = 2.0, *, options: object = None) -> torch.Tensor:
    if factor == 0.0:
        raise ValueError("factor must not be 0")
    return x * factor


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Call `scale` through a log of some level; return what was written."""

    def call(level: int, *args: object, **kwargs: object) -> str:
        path = tmp_path / f"{level}.log"
        path.unlink(missing_ok=True)
        ApiLog(level, str(path)).wrap(scale)(*args, **kwargs)
        return path.read_text()

    return call


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("LOGLEVEL", "LOGDEST"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_off_means_the_plain_functions() -> None:
    code = (
        "import sys, fi_backend\n"
        "from fi_backend.decode import BatchDecodeWithPagedKVCacheWrapper as wrapper\n"
        "calls = (fi_backend.rmsnorm, wrapper.run, wrapper.__init__, fi_backend.plan)\n"
        "assert not any(hasattr(call, '__wrapped__') for call in calls)\n"
        "assert 'fi_backend.api_logging' not in sys.modules\n"
    )
    for level in ("", "0"):
        done = run_python(code, FI_BACKEND_LOGLEVEL=level)
        assert done.returncode == 0, done.stderr


def test_on_means_that_every_public_call_is_wrapped() -> None:
    code = (
        "import functools, inspect, fi_backend as fi\n"
        "from fi_backend.norm import rmsnorm\n"
        "assert rmsnorm is fi.rmsnorm\n"
        "for name in fi.__all__:\n"
        "    value = getattr(fi, name)\n"
        "    call = value.func if isinstance(value, functools.partial) else value\n"
        "    if not isinstance(value, type):\n"
        "        assert hasattr(call, '__wrapped__'), name\n"
        "    elif hasattr(value, 'run'):\n"
        "        assert hasattr(value.run, '__wrapped__'), name\n"
        "        assert hasattr(value.__init__, '__wrapped__'), name\n"
        "wrapper = fi.BatchDecodeWithPagedKVCacheWrapper\n"
        "assert wrapper.begin_forward is wrapper.plan\n"
        "assert 'paged_kv_cache' in inspect.signature(wrapper.run).parameters\n"
        "assert fi.single_prefill_with_kv_cache_return_lse.func is fi.single_prefill_with_kv_cache"
    )
    done = run_python(code, FI_BACKEND_LOGLEVEL="1")
    assert done.returncode == 0, done.stderr


_DECODE = """
import torch, fi_backend as fi
wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, dtype=torch.uint8))
table = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0], [3])]
wrapper.plan(*table, 4, 2, 64, 16, q_data_type="float32")
wrapper.run(torch.randn(1, 4, 64), torch.randn(1, 2, 16, 2, 64))
"""


@pytest.mark.parametrize("prefix", ["FI_BACKEND", "FLASHINFER"])
def test_calls_of_a_program(prefix: str, tmp_path: Path) -> None:
    variables = {f"{prefix}_LOGLEVEL": "3", f"{prefix}_LOGDEST": str(tmp_path / "%i.log")}
    done = run_python(_DECODE, **variables)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert f"pid {path.stem}]" in text
    wrapper = "BatchDecodeWithPagedKVCacheWrapper"
    # One record a call of the program's: what our calls call themselves is not among them.
    assert re.findall(r"fi_backend\.(\S+ #\d.*)", text) == [
        f"{wrapper}.__init__ #1",
        f"{wrapper}.plan #2",
        f"{wrapper}.plan #2 returned",
        f"{wrapper}.run #3",
        f"{wrapper}.run #3 returned",
    ]
    assert "  q: float32 [1, 4, 64] cpu\n" in text
    assert "  q_data_type: 'float32'\n" in text
    assert "  result: float32 [1, 4, 64] cpu\n" in text


def test_a_bad_variable_stops_nothing() -> None:
    for variables in (
        {"FI_BACKEND_LOGLEVEL": "loud"},
        {"FI_BACKEND_LOGLEVEL": "3", "FI_BACKEND_LOGDEST": "/no/such/directory/file"},
    ):
        done = run_python("import fi_backend; print(fi_backend.rmsnorm.__name__)", **variables)
        assert done.stdout == "rmsnorm\n"
        assert "API calls are not logged or traced" in done.stderr
        assert list(variables.values())[-1] in done.stderr


def test_levels(record: Record) -> None:
    x = torch.tensor([[1.0, 3.0], [float("nan"), float("inf")]]).T
    assert "x" not in record(1, x).split("scale #1")[1]
    metadata = record(3, x, factor=3.0)
    assert "  x: float32 [2, 2] cpu strides [1, 2]\n  factor: 3.0\n" in metadata
    assert "min=" not in metadata
    statistics = record(5, x)
    assert "  x: float32 [2, 2] cpu strides [1, 2] (min=1 max=3 mean=2 nan=1 inf=1)\n" in statistics
    assert "(min=2 max=6" in statistics.split("returned")[1]


def test_statistics_of_any_dtype(record: Record) -> None:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.bool):
        text = record(5, torch.ones(2), options=torch.ones(3).to(dtype))
        assert "(min=1 max=1 mean=1 nan=0 inf=0)\n" in text.split("options: ")[1]
    assert "(empty)" in record(5, torch.ones(0))
    cache = torch.ones(1).expand(1 << 25)  # of one element's memory
    assert "(too large for statistics)" in record(5, torch.ones(2), options=cache)
    assert "(no values)" in record(5, torch.ones(2, device="meta"))


def test_values_that_hold_tensors_are_described_not_printed(record: Record) -> None:
    spec = fi_backend.AttentionSpec(
        num_qo_heads=4, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.float32
    )
    options = {
        "pair": (torch.ones(2), torch.ones(3)),
        "many": list(range(20)),
        "spec": spec,
        "plan": Plan(
            spec.geometry,
            None,  # type: ignore[arg-type]
            torch.ones(4),
            torch.ones(5),
            fi_backend.Workspace(),
            1,
            0,
            1,
            0,
        ),
        "other": object(),
    }
    text = record(3, torch.ones(2), options=options)
    assert "'pair': [float32 [2] cpu, float32 [3] cpu]" in text
    assert "7, ...]" in text
    assert "AttentionSpec(num_qo_heads=4" in text
    assert "buffer=float32 [4] cpu" in text
    assert "'other': <object>" in text


def test_the_record_is_there_before_the_call_runs(tmp_path: Path) -> None:
    code = (
        "import os, torch\n"
        "from fi_backend.api_logging import ApiLog\n"
        "def crash(x): os.abort()\n"
        f"ApiLog(3, {str(tmp_path / 'log')!r}).wrap(crash)(torch.ones(3))\n"
    )
    assert run_python(code).returncode < 0
    assert "crash #1\n  x: float32 [3] cpu\n" in (tmp_path / "log").read_text()


def test_errors_are_logged_and_raised(tmp_path: Path) -> None:
    log = ApiLog(1, str(tmp_path / "log"))
    with pytest.raises(ValueError, match="must not be 0"):
        log.wrap(scale)(torch.ones(1), 0.0)
    with pytest.raises(TypeError, match="no_such"):
        log.wrap(scale)(torch.ones(1), no_such=1)
    text = (tmp_path / "log").read_text()
    assert "scale #1 raised ValueError: factor must not be 0" in text
    assert "scale #2 raised TypeError" in text


def test_a_full_disk_stops_no_call() -> None:
    logged = ApiLog(1, "/dev/full").wrap(scale)
    with pytest.warns(UserWarning, match="not logged: .*No space left"):
        assert logged(torch.ones(1)).item() == 2.0


_COMPILED = """
import torch, fi_backend as fi
wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, dtype=torch.uint8))
table = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0], [3])]
wrapper.plan(*table, 4, 2, 64, 16, q_data_type="float32")
q, cache, sinks = torch.randn(1, 4, 64), torch.randn(1, 2, 16, 2, 64), torch.ones(4)
function = lambda q, cache: fi.rmsnorm(wrapper.run(q, cache, sinks=sinks), torch.ones(64))
print("compiled calls", flush=True)
compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, cache)
print("plain calls", flush=True)
assert torch.equal(compiled, function(q, cache))
"""


@pytest.mark.parametrize("level", ["3", "5"])
def test_torch_compile_sees_through(level: str, tmp_path: Path) -> None:
    """In one graph, and a layer that run() makes for its sinks is made in the trace too."""
    variables = {"FI_BACKEND_LOGDEST": "stdout", "FI_BACKEND_TRACE_DIR": str(tmp_path)}
    done = run_python(_COMPILED, FI_BACKEND_LOGLEVEL=level, **variables)
    assert done.returncode == 0, done.stderr
    compiled, plain = done.stdout.split("compiled calls")[1].split("plain calls")
    assert "fi_backend." not in compiled
    assert "rmsnorm #" in plain


@pytest.mark.gpu
@pytest.mark.parametrize("level", [3, 5])
def test_calls_inside_a_cuda_graph(level: int, tmp_path: Path) -> None:
    x, weight = torch.randn(4, 128, device="cuda"), torch.ones(128, device="cuda")
    out = torch.empty_like(x)
    expected = fi_backend.rmsnorm(x, weight)  # compiles and loads before the capture
    logged = ApiLog(level, str(tmp_path / "log")).wrap(fi_backend.rmsnorm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logged(x, weight, out=out)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    text = (tmp_path / "log").read_text()
    assert "input: float32 [4, 128] cuda:0" in text
    assert ("no statistics while a CUDA graph is captured" in text) == (level == 5)
