from __future__ import annotations

import pytest

from fi_backend import env
from fi_backend.errors import EnvironmentVariableError, ToolchainError, UnsupportedError
from fi_backend.jit import arch


@pytest.mark.parametrize(
    ("token", "name", "gencode"),
    [
        ("8.0", "8.0", ["arch=compute_80,code=sm_80"]),
        ("9.0", "9.0a", ["arch=compute_90a,code=sm_90a"]),
        ("9.0a", "9.0a", ["arch=compute_90a,code=sm_90a"]),
        ("10.0", "10.0a", ["arch=compute_100a,code=sm_100a"]),
        ("10.3f", "10.3f", ["arch=compute_103f,code=sm_103f"]),
        ("12.0", "12.0f", ["arch=compute_120f,code=sm_120f"]),
        ("12.1a", "12.1a", ["arch=compute_121a,code=sm_121a"]),
        ("sm_90", "9.0", ["arch=compute_90,code=sm_90"]),
        ("sm_100a", "10.0a", ["arch=compute_100a,code=sm_100a"]),
        ("compute_80", "compute_80", ["arch=compute_80,code=compute_80"]),
        (
            "8.0+PTX",
            "8.0+PTX",
            ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"],
        ),
    ],
)
def test_mapping(token: str, name: str, gencode: list[str]) -> None:
    parsed = arch.parse_token(token)
    assert str(parsed) == name
    assert list(parsed.gencode()) == [f"-gencode={word}" for word in gencode]
    assert arch.parse_token(str(parsed)) == parsed or token.startswith("sm_")


def test_list_is_sorted_and_distinct() -> None:
    assert list(map(str, arch.parse_list("10.0;9.0, 9.0a  8.6"))) == ["8.6", "9.0a", "10.0a"]


@pytest.mark.parametrize("text", ["hopper", "9", "9.0b", "7.5", "9.0a+SASS", "90"])
def test_bad_list_names_the_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, text)
    with pytest.raises(EnvironmentVariableError, match=f"{env.CUDA_ARCH_LIST.name}=.*for example"):
        arch.resolve()


def test_detection_gets_the_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "detect", lambda: ((8, 9), (9, 0)))
    assert list(map(str, arch.resolve())) == ["8.9", "9.0a"]


def test_nothing_is_compiled_for_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "detect", lambda: ((7, 5), (9, 0)))
    assert list(map(str, arch.resolve())) == ["9.0a"]
    monkeypatch.setattr(arch, "detect", lambda: ((7, 5),))
    with pytest.raises(ToolchainError, match=r"8\.0 or later, and the GPUs here are of 7\.5"):
        arch.resolve()


@pytest.mark.parametrize(
    ("devices", "order", "places"),
    [
        (None, "", [0, 1, 2]),
        ("", "", []),
        ("-1", "", []),
        ("GPU-b", "", [1]),
        ("GPU-c,GPU-a", "", [2, 0]),
        ("GPU-a,GPU-x,GPU-b", "", [0]),
        ("2", "PCI_BUS_ID", [2]),
        ("1, 0", "PCI_BUS_ID", [1, 0]),
        ("7", "PCI_BUS_ID", []),
        ("2", "FASTEST_FIRST", [0, 1, 2]),  # which one that is, CUDA alone knows
        ("MIG-d", "", [0, 1, 2]),
    ],
)
def test_visible_gpus(
    devices: str | None, order: str, places: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert arch._visible(["GPU-a1", "GPU-b2", "GPU-c3"]) == places


def test_no_gpu_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "detect", tuple)
    with pytest.raises(ToolchainError, match=env.CUDA_ARCH_LIST.name):
        arch.resolve()


def test_supported_majors() -> None:
    archs = arch.parse_list("8.0 9.0")
    assert arch.select(archs, None, module="m") == archs
    assert list(map(str, arch.select(archs, (9, 10), module="m"))) == ["9.0a"]
    with pytest.raises(UnsupportedError, match=r"m: .*8\.0, 9\.0a; .* 12\.x"):
        arch.select(archs, (12,), module="m")


@pytest.mark.parametrize(
    ("token", "device", "runs"),
    [
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("12.0f", (12, 1), True),
        ("10.0a", (10, 3), False),
    ],
)
def test_runs_on(token: str, device: tuple[int, int], runs: bool) -> None:
    assert arch.parse_token(token).runs_on(*device) is runs
