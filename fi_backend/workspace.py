"""Workspace: the scratch memory of one device and stream."""

from __future__ import annotations

import torch

from fi_backend.errors import UnsupportedError

__all__ = ["Workspace"]


class Workspace:
    """Scratch memory that plans of one device and stream share.

    It grows when a plan needs more and never shrinks. What a plan needs is bounded by the number
    of workers, never by the batch or its lengths, so it cannot overflow. Steps that use one
    workspace must run one after the other; give each stream its own.
    """

    def __init__(
        self, device: torch.device | str | None = None, *, buffer: torch.Tensor | None = None
    ) -> None:
        """Make a workspace that starts with the caller's `buffer`, if there is one.

        Args:
            device: where plans run; where `buffer` is if None, and without one the CPU.
            buffer: contiguous scratch of any dtype on `device`, aligned to 4 bytes.

        Raises:
            UnsupportedError: torch cannot use `device` on this machine.
            ValueError: `buffer` is on another device.
        """
        if buffer is None:
            buffer = _empty("cpu" if device is None else device)
        elif device is not None and _empty(device).device != buffer.device:
            raise ValueError(f"buffer must be on device {device}; got {buffer.device}")
        self.device = buffer.device
        scratch = buffer.reshape(-1).view(torch.uint8)
        self._partials = scratch[: scratch.numel() // 4 * 4].view(torch.float32)

    def partials(self, num_floats: int) -> torch.Tensor:
        """Return float32 scratch of at least `num_floats` elements, growing it if needed."""
        if self._partials.numel() < num_floats:
            self._partials = torch.empty(num_floats, dtype=torch.float32, device=self.device)
        return self._partials

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._partials.numel() * self._partials.element_size()


def _empty(device: torch.device | str) -> torch.Tensor:
    try:
        return torch.empty(0, dtype=torch.uint8, device=device)
    except (AssertionError, RuntimeError) as error:  # without CUDA, torch fails an assertion
        raise UnsupportedError(
            f'device must be one that torch can use here, as "cpu"; got {device} ({error})'
        ) from error
