"""Put our factories into SGLang's table of attention backends, and hooks where names are fixed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import torch

from fi_backend import env
from fi_backend.integrations.sglang.factory import factory

__all__ = ["NAME", "register_backends"]

NAME = "fi_backend"
_FLASHINFER = "flashinfer"
_OLDEST_TESTED = (0, 5, 17)
_NEWEST_TESTED = (0, 5, 23)
_MARK = "_fi_backend"


def register_backends(logger: logging.Logger) -> None:
    """Register `fi_backend`, and `flashinfer` unless it is to be kept; undo all if a step fails.

    Raises:
        RuntimeError: `FI_BACKEND_STRICT` is set and this SGLang was not tested.
    """
    from sglang.version import __version__ as version

    if env.DISABLE.get():
        logger.warning("fi_backend: standing aside because %s is set", env.DISABLE.source())
        return
    if not _is_tested(version):
        message = (
            f"SGLang {version} is outside the tested range "
            f"{_text(_OLDEST_TESTED)} to {_text(_NEWEST_TESTED)}"
        )
        if env.STRICT.get():
            raise RuntimeError(message)
        logger.warning("fi_backend: standing aside: %s", message)
        return
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if NAME in ATTENTION_BACKENDS:
        return
    takes_flashinfer = not env.KEEP_FLASHINFER.get()
    undo: list[Callable[[], None]] = []
    try:
        _extend_table(ATTENTION_BACKENDS, takes_flashinfer, undo)
        _extend_choices(undo)
        _hook(takes_flashinfer, undo)
    except Exception:
        for step in reversed(undo):
            step()
        raise


def _is_tested(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return match is not None and (
        _OLDEST_TESTED <= (int(match[1]), int(match[2]), int(match[3])) <= _NEWEST_TESTED
    )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _extend_table(
    table: dict[str, Any], takes_flashinfer: bool, undo: list[Callable[[], None]]
) -> None:
    ours = {NAME: factory(None)}
    if takes_flashinfer:
        ours[_FLASHINFER] = factory(table[_FLASHINFER])
    before = dict(table)

    def restore() -> None:
        table.clear()
        table.update(before)

    undo.append(restore)
    table.update(ours)


def _extend_choices(undo: list[Callable[[], None]]) -> None:
    """Let the command line take our name, before SGLang builds its parser."""
    from sglang.srt import server_args

    server_args.add_attention_backend_choices([NAME])
    undo.append(lambda: server_args.ATTENTION_BACKEND_CHOICES.remove(NAME))
    server_args.add_deterministic_attention_backend_choices([NAME])
    undo.append(lambda: server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.remove(NAME))


def _hook(takes_flashinfer: bool, undo: list[Callable[[], None]]) -> None:
    """Hook what goes by name and not through the table."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    factories = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
    around: dict[str, Callable[..., Any]] = {f"{factories}._create_backend": _create_draft_by_name}
    if takes_flashinfer:
        around |= {
            f"{factories}._create_flashinfer_decode_backend": _create_draft_decode,
            f"{factories}._create_flashinfer_prefill_backend": _create_draft_extend,
            "sglang.srt.utils.common.assert_pkg_version": _assert_other_packages,
        }
    if not torch.cuda.is_available():
        around["sglang.srt.utils.common.support_triton"] = _support_triton
    for target, hook in around.items():
        HookRegistry.register(target, hook, HookType.AROUND)
        undo.append(HookRegistry._hooks[target].pop)  # before any other plugin registers one


def _create_draft_decode(original: Callable[..., Any], factory: Any) -> Any:
    from fi_backend.integrations.sglang.draft import create_decode

    return create_decode(factory)


def _create_draft_extend(original: Callable[..., Any], factory: Any) -> Any:
    from fi_backend.integrations.sglang.draft import create_extend

    return create_extend(factory)


def _create_draft_by_name(
    original: Callable[..., Any], factory: Any, kind: str, backends: Any, *args: Any
) -> Any:
    """Add our name to the ones that SGLang's factory of draft backends knows."""
    # `kind` says whose option counts, the entries which of the two backends is wanted.
    decodes = backends[_FLASHINFER].__name__ == "_create_flashinfer_decode_backend"
    create = _create_draft_decode if decodes else _create_draft_extend
    return original(factory, kind, {**backends, NAME: lambda: create(original, factory)}, *args)


def _assert_other_packages(
    original: Callable[..., None], package: str, *args: Any, **kwargs: Any
) -> None:
    """`--attention-backend flashinfer` does not need the flashinfer package any more."""
    if package != "flashinfer_python":
        original(package, *args, **kwargs)


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """SGLang's scheduler launches Triton kernels for every name but two, on a CPU too."""
    return backend not in (NAME, _FLASHINFER) and original(backend)
