from __future__ import annotations

import json

import pytest

from fi_backend.jit import KernelSpec

GOOD: dict = {"name": "norm_cpu", "target": "cpu", "templates": ("norm.cc.j2",)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "a/b", "name must match"),
        ("name", "", "name must match"),
        ("target", "rocm", "target must be one of"),
        ("templates", (), "templates must be names ending in"),
        ("templates", ("norm.cc",), "templates must be names ending in"),
        ("templates", ("norm.cu.j2",), "takes no .cu.j2"),
        ("templates", ("a/x.cc.j2", "b/x.cc.j2"), "must differ in file name"),
        ("parameters", (("b", 1), ("a", 2)), "unique and sorted"),
        ("parameters", (("a", 1), ("a", 2)), "unique and sorted"),
        ("parameters", (("a-b", 1),), "identifiers"),
    ],
)
def test_malformed_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelSpec(**{**GOOD, field: value})


def test_survives_json() -> None:
    spec = KernelSpec(
        **GOOD,
        parameters=(("causal", True), ("scale", 0.5), ("type", "fi::bf16"), ("width", 8)),
        extra_cflags=("-Wall",),
        supported_majors=(9, 10),
        root="/x",
    )
    assert KernelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_identity_tells_equal_values_of_different_type_apart() -> None:
    values = (1, 1.0, True)
    identities = {KernelSpec(**GOOD, parameters=(("x", v),)).identity for v in values}
    assert len(identities) == len(values)
