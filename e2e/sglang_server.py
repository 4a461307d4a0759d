"""SGLang's server as a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.server import Api, Server, flags
from e2e.sglang_served import engine_environment
from e2e.sglang_throughput import backends, engine_arguments
from e2e.workloads import Model

__all__ = ["SGLANG", "sglang_server", "start_sglang"]

SGLANG = Api(
    "/generate",
    lambda prompt, tokens: {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
        "stream": True,
    },
)


def sglang_server(
    folder: Path,
    dtype: str,
    backend: str,
    arguments: Mapping[str, Any],
    log: Path,
    environment: Mapping[str, str],
) -> Server:
    """Start `sglang.launch_server`.

    Args:
        folder: the model's; with a tokenizer.
        dtype: of weights and activations.
        backend: the attention backend's name.
        arguments: of SGLang's Engine, which become flags.
        log: file for what the server prints.
        environment: more variables of the process.
    """
    named = {
        "model_path": str(folder),
        "dtype": dtype,
        "attention_backend": backend,
        "sampling_backend": "pytorch",
        "random_seed": 0,
        **arguments,
    }
    # Its flags have no opposite.
    asked = {name: value for name, value in named.items() if value is not False}
    program = ["sglang.launch_server", *flags(asked)]
    return Server(program, SGLANG, log, engine_environment(environment))


def start_sglang(
    page_size: int, model: Model, folder: Path, wanted: Sequence[str], gpu_bytes: int
) -> dict[str, Server]:
    """Start SGLang's servers, a log of each beside the model's folder."""
    contenders = backends(wanted)
    arguments = engine_arguments(model, page_size, len(contenders), gpu_bytes)
    return {
        name: sglang_server(
            folder,
            model.dtype,
            backend.name or name,
            arguments,
            folder.parent / f"{name}.log",
            dict(backend.environment),
        )
        for name, backend in contenders.items()
    }
