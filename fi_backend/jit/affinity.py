"""How many cores a build may use, and letting its processes use them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from fi_backend import env

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@contextlib.contextmanager
def every_allowed_core() -> Iterator[None]:
    """Let processes started inside run on every core that the machine or its cpuset allows.

    An engine pins its workers to a core or two, and a compiler started there would inherit that.
    Affinity belongs to a thread, so only the calling one is widened, for a moment; the kernel
    intersects the request with what the control group allows.
    """
    try:
        pinned = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    except (OSError, AttributeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


def jobs() -> int:
    """Return how many compiles run at a time: ``MAX_JOBS``, or the cores a build may use."""
    asked = env.MAX_JOBS.get()
    if asked is not None:
        return asked
    try:
        with every_allowed_core():
            cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        cores = os.cpu_count() or 1
    return max(1, min(cores, _quota(_QUOTA)))


def _quota(path: Path) -> int:
    """Return the cores that the control group's time quota amounts to, rounded up."""
    try:
        quota, period = path.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 30
