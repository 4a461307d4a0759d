"""Training text: the sources and the documentation of a Python standard library."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from tiny_model.checkpoint import EOS_ID, FIRST_BYTE_ID

# `encodings` is character tables, which are neither code nor prose to learn from.
SKIPPED_DIRS = frozenset({"__pycache__", "dist-packages", "encodings", "site-packages"})
TOPICS = "pydoc_data/topics.py"
HELD_OUT_ONE_IN = 32


def documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, ordered by name of the file.

    A document is one ``*.py`` file, named by its path relative to ``stdlib``, or one topic of
    ``pydoc_data/topics.py`` as plain text. Files that are not UTF-8 are left out.
    """
    paths = []
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_DIRS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    for name, path in sorted((path.relative_to(stdlib).as_posix(), path) for path in paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name == TOPICS:
            yield from ((f"{name}#{topic}", prose) for topic, prose in _topics(text).items())
        elif text:
            yield name, text


def _topics(source: str) -> dict[str, str]:
    """Return the dictionary of help topics without running the module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            return ast.literal_eval(node.value)
    raise ValueError(f"{TOPICS}: expected an assignment of a dictionary of topics, found none")


def is_held_out(name: str) -> bool:
    """Whether the document is kept from training: decided by its name alone, so that it holds
    for other releases of the standard library too."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def split(stdlib: Path) -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts)."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in documents(stdlib):
        parts[is_held_out(name)].append(text)
    if not all(parts):
        raise ValueError(
            f"--stdlib: {stdlib} has too few *.py files to train on; "
            "pass the folder that sysconfig.get_path('stdlib') names"
        )
    return parts


def token_stream(texts: Iterable[str]) -> torch.Tensor:
    """Join documents into one stream of token ids, int64 ``[num_bytes + num_texts]``, an end of
    sequence after each."""
    pieces = []
    for text in texts:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        pieces += [data.to(torch.int64) + FIRST_BYTE_ID, torch.tensor([EOS_ID])]
    return torch.cat(pieces)
