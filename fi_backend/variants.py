"""Custom attention variants: C++ functions of a user's own, compiled into the attention kernels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["AttentionVariant"]

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_MEMBERS = {
    torch.float32: "const float*",
    torch.int32: "const int32_t*",
    torch.int64: "const int64_t*",
    torch.uint8: "const uint8_t*",
    torch.bool: "const bool*",
    float: "float",
    int: "int32_t",
}
_TENSOR_DTYPES = tuple(key for key in _MEMBERS if isinstance(key, torch.dtype))
# What the struct around the source, or the source itself, already has.
_TAKEN = ("Members", "kMemberNames", "kUsesSoftmax", "logit", "sees", "weight", "output")
_MAX_BYTES = 128  # kMaxVariantBytes of attention/params.h: 8 a tensor, 4 a scalar


@dataclass(frozen=True, eq=False)
class AttentionVariant:
    """Attention with another score, mask, weight or output; see docs/attention-variants.md.

    Attributes:
        name: a C++ identifier of up to 40 characters; it appears in names of modules and kernels,
            and compiler errors give lines of `source` as lines of a file of this name.
        source: the body of a C++ struct with one or more of these functions, which every kernel of
            the CPU and of a GPU compiles. Logits are natural ones, after all factors::

                FI_HOST_DEVICE float logit(float logit, const Pair& at) const;
                FI_HOST_DEVICE bool sees(const Pair& at) const;
                FI_HOST_DEVICE float weight(float logit, const Pair& at) const;
                FI_HOST_DEVICE float output(float value, const Row& row, int dim) const;

        tensors: dtypes of the tensors whose elements the functions read, by name: float32, int32,
            int64, uint8 or bool. They are pointers in C++, of the same name.
        scalars: float or int for each scalar that they read, by name: `float` or `int32_t` in C++.
        use_softmax: normalise weights by softmax. False needs weight(): the output is then the sum
            of weight * v, and there is no lse.
        code: the C++ type of the variant, and the text that defines it.

    Raises:
        TypeError: a field has a wrong type.
        ValueError: a name is malformed or used twice, a dtype is not allowed, there are too many
            tensors and scalars, or `source` includes a file.
    """

    name: str
    source: str
    tensors: Mapping[str, torch.dtype] = field(default_factory=dict)
    scalars: Mapping[str, type] = field(default_factory=dict)
    use_softmax: bool = True
    code: tuple[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(self.tensors))
        object.__setattr__(self, "scalars", dict(self.scalars))
        self._check()
        body = self._body()
        digest = hashlib.sha256(body.encode()).hexdigest()[:12]
        # Unlike any other variant's: modules of several may be in one process.
        type_name = f"{self.name}_{digest}"
        definition = (
            f"namespace fi::variants {{\nstruct {type_name} {{\n{body}\n}};\n"
            f"static_assert(check_variant<{type_name}>());\n}}  // namespace fi::variants\n"
        )
        object.__setattr__(self, "code", (f"fi::variants::{type_name}", definition))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionVariant) and self.code == other.code

    def __hash__(self) -> int:
        return hash(self.code)

    def members(self, values: Mapping[str, Any] | None) -> tuple[Any, ...]:
        """Return the values of a run in the order in which kernels take them.

        Args:
            values: a tensor or a number for each name of `tensors` and `scalars`.

        Raises:
            TypeError: a value is not a tensor, or not a number.
            ValueError: a name is missing or unknown.
        """
        values = values or {}
        kinds: dict[str, torch.dtype | type] = {**self.tensors, **self.scalars}
        if values.keys() != kinds.keys():
            missing = sorted(kinds.keys() - values.keys())
            unknown = sorted(values.keys() - kinds.keys())
            raise ValueError(
                f"variant {self.name} takes {', '.join(kinds) or 'no values'}; got "
                + " and ".join(
                    f"{what} {', '.join(names)}"
                    for what, names in (("no", missing), ("unknown", unknown))
                    if names
                )
            )
        return tuple(_checked_value(name, values[name], kind) for name, kind in kinds.items())

    def values_by_name(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """Name values that are given in order.

        Args:
            arguments: values of the tensors, then of the scalars.

        Raises:
            ValueError: there are too few or too many.
        """
        names = (*self.tensors, *self.scalars)
        if len(arguments) != len(names):
            raise ValueError(
                f"variant {self.name} takes {len(names)} values "
                f"({', '.join(names) or 'none'}); got {len(arguments)}"
            )
        return dict(zip(names, arguments, strict=True))

    def _check(self) -> None:
        if not isinstance(self.source, str):
            raise TypeError(f"source must be a str; got {type(self.source).__name__}")
        if re.search(r"^\s*#\s*include\b", self.source, re.MULTILINE):
            raise ValueError("source must not include files: write out what the functions need")
        names = (*self.tensors, *self.scalars)
        for what, name in (("name", self.name), *(("tensors and scalars", name) for name in names)):
            if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    f"{what}: a name must be a C++ identifier of up to 40 characters, and not one "
                    f"of {', '.join(_TAKEN)}; got {name!r}"
                )
        twice = sorted(self.tensors.keys() & self.scalars.keys())
        if twice:
            raise ValueError(f"scalars must have other names than tensors; got {twice[0]!r} twice")
        for name, dtype in self.tensors.items():
            if dtype not in _TENSOR_DTYPES:
                allowed = ", ".join(map(str, _TENSOR_DTYPES))
                raise ValueError(f"tensors[{name!r}] must be one of {allowed}; got {dtype}")
        for name, kind in self.scalars.items():
            if kind not in (float, int):
                raise ValueError(f"scalars[{name!r}] must be float or int; got {kind}")
        num_bytes = 8 * len(self.tensors) + 4 * len(self.scalars)
        if num_bytes > _MAX_BYTES:
            raise ValueError(
                f"tensors and scalars must take at most {_MAX_BYTES} bytes, 8 a tensor and 4 a "
                f"scalar; got {num_bytes}. Put scalars into a tensor"
            )

    def _body(self) -> str:
        """Return what the struct consists of: members, facts about them, and the source."""
        members = {name: _MEMBERS[kind] for name, kind in {**self.tensors, **self.scalars}.items()}
        names = ", ".join([*(f'"{name}"' for name in members), "nullptr"])
        return "\n".join(
            [
                *(f"  {kind} {name};" for name, kind in members.items()),
                f"  using Members = MemberList<{', '.join(members.values())}>;",
                f"  static constexpr const char* kMemberNames[] = {{{names}}};",
                f"  static constexpr bool kUsesSoftmax = {str(bool(self.use_softmax)).lower()};",
                f'#line 1 "{self.name}"',
                self.source,
                f'#line 1 "end of {self.name}"',
            ]
        )


def _checked_value(name: str, value: object, kind: torch.dtype | type) -> object:
    """Check the kind of a value; native code checks dtype, device and layout of a tensor."""
    if isinstance(kind, torch.dtype):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
        return value
    allowed = (int,) if kind is int else (int, float)
    if not isinstance(value, allowed):
        raise TypeError(f"{name} must be a number, {kind.__name__}; got {type(value).__name__}")
    return value
