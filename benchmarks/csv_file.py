"""The CSV file of benchmark rows: columns that stay, with FlashInfer's names where it has them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["COLUMNS", "append_rows"]

# New columns go to the end: files that exist are added to.
COLUMNS = (
    "routine",
    "median_time",
    "std_time",
    "tflops",
    "tb_per_sec",
    "backend",
    "resolved_backend",
    "batch_size",
    "s_qo",
    "s_kv",
    "num_qo_heads",
    "num_kv_heads",
    "head_dim_qk",
    "head_dim_vo",
    "page_size",
    "hidden_size",
    "num_states",
    "q_dtype",
    "kv_dtype",
    "out_dtype",
    "causal",
    "random_actual_seq_len",
    "interleave",
    "random_seed",
    "refcheck",
    "max_error",
    "device",
    "machine",
    "commit",
    "case_tag",
    "repro_command",
)


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, which is made with a heading where it is missing.

    Args:
        path: the file.
        rows: values by column; a column that is left out stays empty.

    Raises:
        ValueError: the file has other columns, or a row has a column that is none.
    """
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            heading = next(csv.reader(file))
        if tuple(heading) != COLUMNS:
            raise ValueError(f"{path} has other columns ({', '.join(heading)}); name a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
