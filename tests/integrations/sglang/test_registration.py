"""The plugin in fresh processes: what it changes in SGLang, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

REPORT = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS as table
stock = table["flashinfer"]
from fi_backend.integrations.sglang import activate
{before}
activate()
activate()
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
from sglang.srt import server_args
from sglang.srt.utils import common
print("ours", "fi_backend" in table)
print("flashinfer", "stock" if table["flashinfer"] is stock else "ours")
for names in ("ATTENTION_BACKEND_CHOICES", "DETERMINISTIC_ATTENTION_BACKEND_CHOICES"):
    print(names, getattr(server_args, names).count("fi_backend"))
try:
    common.assert_pkg_version("flashinfer_python", "999", "it is old")
    print("needs no flashinfer")
except Exception as error:
    print("needs flashinfer")
try:
    common.assert_pkg_version("sglang-kernel-x", "999", "it is old")
except Exception as error:
    print("other packages are asked for")
for name in ("fi_backend", "flashinfer", "triton", "torch_native"):
    print("triton for", name, common.support_triton(name))
"""

REGISTRATION = "from fi_backend.integrations.sglang import registration"
FAILS_LATE = """
from sglang.srt.plugins.hook_registry import HookRegistry
register = HookRegistry.register
def fail_late(target, *rest):
    if target.endswith("support_triton"):
        raise RuntimeError("it is late")
    register(target, *rest)
HookRegistry.register = fail_late
"""


def report(before: str = "", **variables: str) -> tuple[list[str], int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REPORT.replace("{before}", before)],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout + done.stderr).splitlines(), done.returncode


def test_takes_both_names_once() -> None:
    lines, code = report(CUDA_VISIBLE_DEVICES="")
    assert code == 0, lines
    assert lines[-10:] == [
        "ours True",
        "flashinfer ours",
        "ATTENTION_BACKEND_CHOICES 1",
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES 1",
        "needs no flashinfer",
        "other packages are asked for",
        "triton for fi_backend False",
        "triton for flashinfer False",
        "triton for triton True",
        "triton for torch_native False",
    ]


def test_flashinfer_can_be_kept() -> None:
    lines, code = report(FI_BACKEND_KEEP_FLASHINFER="1")
    assert code == 0, lines
    assert {"ours True", "flashinfer stock", "needs flashinfer"} <= set(lines)


@pytest.mark.parametrize(
    ("before", "variables", "words"),
    [
        ("", {"FI_BACKEND_DISABLE": "1"}, "standing aside because FI_BACKEND_DISABLE is set"),
        (
            "import sglang.version; sglang.version.__version__ = '0.6.0'",
            {},
            "standing aside: SGLang 0.6.0 is outside the tested range 0.5.17 to 0.5.23",
        ),
        (
            f"{REGISTRATION}; registration._extend_choices = None",
            {},
            "not registered (TypeError: 'NoneType' object is not callable); SGLang keeps its own",
        ),
    ],
)
def test_standing_aside_is_said(before: str, variables: dict[str, str], words: str) -> None:
    lines, code = report(before, **variables)
    assert code == 0, lines
    assert any(words in line for line in lines), lines
    assert {"ours False", "flashinfer stock"} <= set(lines)


def test_late_failure_undoes_everything() -> None:
    lines, code = report(FAILS_LATE, CUDA_VISIBLE_DEVICES="")
    assert code == 0, lines
    assert any("not registered (RuntimeError: it is late)" in line for line in lines), lines
    assert lines[-10:] == [
        "ours False",
        "flashinfer stock",
        "ATTENTION_BACKEND_CHOICES 0",
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES 0",
        "needs flashinfer",
        "other packages are asked for",
        "triton for fi_backend True",
        "triton for flashinfer True",
        "triton for triton True",
        "triton for torch_native False",
    ]


@pytest.mark.parametrize(
    "before",
    [
        "import sglang.version; sglang.version.__version__ = '0.6.0'",
        f"{REGISTRATION}; registration._hook = None",
    ],
)
def test_strict_mode_ends_the_process(before: str) -> None:
    lines, code = report(before, FI_BACKEND_STRICT="1")
    assert code != 0
    assert "fi_backend: not registered" in lines[-1]


def test_plugin_loader_finds_us_by_entry_point() -> None:
    from importlib.metadata import entry_points

    found = [point.value for point in entry_points(group="sglang.srt.plugins")]
    assert "fi_backend.integrations.sglang:activate" in found
