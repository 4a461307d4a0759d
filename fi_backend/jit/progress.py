"""What a person sees while kernels compile."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from fi_backend import env

# Called with (finished commands, all commands, what just finished).
ProgressCallback = Callable[[int, int, str], None]

_log = logging.getLogger("fi_backend.jit")
_LOG_EVERY_SECONDS = 10.0


def console(names: list[str]) -> ProgressCallback:
    """Return a callback that draws one line on a terminal, and logs now and then elsewhere."""
    title = names[0] if len(names) == 1 else f"{len(names)} kernel modules"
    if sys.stderr is not None and sys.stderr.isatty():
        return _line(title)
    return _log_lines(title)


def _line(title: str) -> ProgressCallback:
    def update(done: int, total: int, what: str) -> None:
        bar = "#" * (20 * done // max(total, 1))
        end = "\n" if done == total else ""
        text = f"fi_backend: compiling {title} [{bar:<20}] {done}/{total} {what}"
        sys.stderr.write(f"\r\x1b[K{text[:160]}{end}")
        sys.stderr.flush()

    return update


def _log_lines(title: str) -> ProgressCallback:
    ensure_visible()
    started = last = time.monotonic()
    _log.info("compiling %s", title)

    def update(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _LOG_EVERY_SECONDS:
            last = now
            _log.info("compiling %s: step %d of %d, %.1f s", title, done, total, now - started)

    return update


def ensure_visible() -> None:
    """Give our logger a handler where the process has configured no logging at all.

    A first compile takes seconds; without this an engine that logs only its own name looks hung.
    """
    logger = logging.getLogger("fi_backend")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(env.LOGGING_LEVEL.get().upper())
