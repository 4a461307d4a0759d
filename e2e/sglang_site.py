"""Where SGLang is for those who start a process with it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["CPU_ARGUMENTS", "CPU_ENVIRONMENT", "sglang_path"]

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "FI_BACKEND_E2E_SGLANG_SITE"
# SGLang names the CPU by a variable; of its kernels there is no CPU build, and none is called.
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1"}
# What its engine has to be told without a GPU.
CPU_ARGUMENTS = {
    "device": "cpu",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
}


def sglang_path() -> str:
    """Return the PYTHONPATH of a process that imports SGLang.

    It is looked for in the environment, then in the folder that VARIABLE names or that
    scripts/fetch_sglang.sh fills. Stand-ins for packages without a CPU build come last.

    Raises:
        FileNotFoundError: there is none.
    """
    site = Path(os.environ.get(VARIABLE) or ROOT / ".venv/opt/sglang")
    if importlib.util.find_spec("sglang") is not None:
        site = ROOT
    elif not (site / "sglang").is_dir():
        raise FileNotFoundError(
            f"SGLang is not installed, nor in {site}; run scripts/fetch_sglang.sh"
        )
    rest = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    stubs = ROOT / "tests/integrations/sglang/stubs"
    return os.pathsep.join([str(site), str(ROOT), *rest, str(stubs)])
