"""The build lock of one cache entry.

``flock`` belongs to an open file, so the kernel releases it when its holder dies, however it dies:
there is no stale lock to detect. It also keeps two threads of one process apart, because each opens
the file itself.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from fi_backend import env
from fi_backend.errors import CacheLockTimeout

_POLL_SECONDS = 0.05


class BuildLock:
    """An exclusive lock on a file, which holds the holder's process id for error messages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self.keeps_others_out = False  # while it is held; not on a file system without locks

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        self.keeps_others_out = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            # Publishing is atomic anyway: at worst two build it, each in a directory of its own.
            self.keeps_others_out = False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._descriptor = descriptor
        return True

    def acquire(self, timeout: float) -> None:
        """Wait for the lock.

        Raises:
            CacheLockTimeout: it is still held after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.try_acquire():
            if time.monotonic() >= deadline:
                raise CacheLockTimeout(
                    f"{self._path}: held for {timeout:g} s by process {self._holder()}, which is "
                    f"building this kernel; wait for it or end it (its death frees the lock), or "
                    f"raise {env.LOCK_TIMEOUT.name}"
                )
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _holder(self) -> str:
        try:
            return self._path.read_text() or "(unknown)"
        except OSError:
            return "(unknown)"
