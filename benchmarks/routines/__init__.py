"""What `python -m benchmarks` can time, by FlashInfer's names where it has the routine."""

from __future__ import annotations

from benchmarks.routines import attention, cache, rows
from benchmarks.routines.routine import Options, Routine

__all__ = ["ROUTINES", "Options", "Routine"]

ROUTINES: dict[str, Routine] = {
    routine.name: routine for routine in (*attention.ROUTINES, *cache.ROUTINES, *rows.ROUTINES)
}
