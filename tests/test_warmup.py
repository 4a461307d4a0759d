"""Which kernels a model's config asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fi_backend import AttentionSpec, PagedAttention, compile_kernels, jit, warmup
from fi_backend.errors import UnsupportedError
from fi_backend.jit import KernelSpec
from fi_backend.kernels import attention, attention_cuda
from fi_backend.warmup import specs_for_model

LLAMA: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


def names(config: dict[str, Any]) -> set[str]:
    return {spec.name for spec in specs_for_model(config)}


def test_a_llama_needs_one_module_of_each_family() -> None:
    families = {name.split("_")[0] for name in names(LLAMA)}
    assert families == {
        "plan", "decode", "prefill", "append", "merge", "norm", "rope", "activation", "page", "pack"
    }  # fmt: skip
    assert any("bf16" in name and "d128x128" in name for name in names(LLAMA))


def test_the_cache_dtype_and_nested_configs_are_followed() -> None:
    assert any("e5m2" in name for name in names(LLAMA | {"kv_cache_dtype": "fp8_e5m2"}))
    nested = {"text_config": LLAMA | {"head_dim": 256}, "hidden_size": 7}
    assert any("d256x256" in name for name in names(nested))


def test_every_head_size_of_a_hybrid_model_is_built() -> None:
    hybrid = names(LLAMA | {"head_dim": 64, "global_head_dim": 128})
    assert sum(name.startswith("decode") for name in hybrid) == 2


def test_kernels_for_a_gpu() -> None:
    config = LLAMA | {"kv_cache_dtype": "fp8_e4m3"}
    specs = specs_for_model(config, "cuda")
    assert {spec.target for spec in specs} == {"cuda"}
    assert {spec.name for spec in specs} == {
        "plan_cuda",
        "decode_cuda_bf16_e4m3_bf16_d128x128",
        "prefill_cuda_bf16_e4m3_bf16_d128x128",
        "prefill_cuda_bf16_e4m3_f32_d128x128_KeptParts",
        "append_cuda_bf16_e4m3",
        "merge_cuda_bf16_bf16",
        "rmsnorm_cuda_bf16_bf16",
        "layernorm_cuda_bf16_bf16",
        "rope_cuda_bf16",
        "activation_cuda_bf16",
        "rope_append_cuda_bf16_e4m3",
        "page_table_cuda",
        "pack_masks_cuda",
    }
    with pytest.raises(ValueError, match=r"q_dtype must be one of .* on cuda"):
        specs_for_model(LLAMA | {"torch_dtype": "float32"}, "cuda")


def test_one_launch_for_both_lines_is_of_sm90_and_can_be_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def has_mixed() -> bool:
        return "mixed_cuda_bf16_bf16_bf16_d128x128" in {
            spec.name for spec in specs_for_model(LLAMA, "cuda")
        }

    monkeypatch.setenv("FI_BACKEND_CUDA_ARCH_LIST", "8.0")
    assert not has_mixed()
    monkeypatch.setenv("FI_BACKEND_CUDA_ARCH_LIST", "9.0")
    assert has_mixed()
    monkeypatch.setenv("FI_BACKEND_SEPARATE_LAUNCHES", "1")
    assert not has_mixed()


def layer(head_dim: int, **options: Any) -> AttentionSpec:
    return AttentionSpec(
        num_qo_heads=4, num_kv_heads=2, head_dim_qk=head_dim, q_dtype=torch.bfloat16, **options
    )


def test_an_operator_can_leave_out_what_shares_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_BACKEND_SHARED_PREFIX", "0")
    assert not any("KeptParts" in spec.name for spec in specs_for_model(LLAMA, "cuda"))


def test_decode_needs_the_few_row_kernel_alone_while_it_takes_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two query heads per KV head, and heads of 256 that leave room for half as many rows."""
    monkeypatch.setenv("FI_BACKEND_CUDA_ARCH_LIST", "9.0a")

    def families(head_dim: int, max_qo_len: int | None, device: str = "cuda") -> set[str]:
        specs = warmup.attention_kernels([layer(head_dim)], device, max_qo_len=max_qo_len)
        return {spec.name.split("_")[0] for spec in specs}

    few = {"plan", "decode", "append"}
    assert families(128, 1) == families(128, 16) == families(256, 8) == few
    assert families(128, 17) == families(128, None) == {*few, "prefill", "mixed"}
    assert families(256, 9) == {*few, "prefill"}
    assert families(128, 1, "cpu") == {*few, "prefill"}


@pytest.mark.parametrize("max_qo_len", [1, None])
def test_a_layer_compiles_with_its_planner_in_one_build(
    max_qo_len: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a decode wrapper makes, and what others do."""
    monkeypatch.setenv("FI_BACKEND_CUDA_ARCH_LIST", "9.0a")
    builds: list[list[KernelSpec]] = []
    module = SimpleNamespace(get_function=lambda _: lambda *_: 0)
    monkeypatch.setattr(attention_cuda, "build", builds.append)
    monkeypatch.setattr(attention_cuda, "_kernels", {})
    for owner in (attention_cuda, jit):
        monkeypatch.setattr(owner, "load", lambda _: module)
    monkeypatch.setattr(attention, "_cuda_call_counts", {})
    PagedAttention(layer(128), "cuda", max_qo_len=max_qo_len)
    (specs,) = builds
    others = [] if max_qo_len == 1 else ["mixed", "prefill"]
    assert sorted(s.name.split("_")[0] for s in specs) == sorted(["decode", "plan", *others])


def test_layers_are_compiled_in_one_build(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[list[KernelSpec]] = []
    monkeypatch.setattr(warmup, "build", builds.append)
    layers = [layer(64), layer(128), layer(64, window_left=7), layer(64, page_size=32)]
    compile_kernels(layers, "cuda")
    (specs,) = builds
    families = sorted(spec.name.split("_")[0] for spec in specs)
    assert families == ["append", "decode", "decode", "plan", "prefill", "prefill"]
    compile_kernels([layer(64, share_prefixes=True)], "cuda")
    names = [spec.name for spec in builds.pop()]
    assert [name for name in names if "f32" in name] == [
        "prefill_cuda_bf16_bf16_f32_d64x64_KeptParts"
    ]
    compile_kernels([], "cuda")
    compile_kernels(layers[:1], "cuda", step_tables=True)
    names = [spec.name for spec in builds.pop()]
    assert {"page_table_cuda", "pack_masks_cuda"} < set(names)
    with pytest.raises(UnsupportedError, match="compile_kernels: head_dim_qk must be a multiple"):
        compile_kernels([layer(64), layer(40)], "cuda")
    assert len(builds) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"torch_dtype": "bfloat16"}, "head size is unknown"),
        (LLAMA | {"torch_dtype": "int8"}, "dtype must be one of .*int8"),
        (LLAMA | {"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype must be one of .*nvfp4"),
        (LLAMA | {"kv_lora_rank": 512}, "latent attention"),
        (LLAMA | {"head_dim": 100}, "head_dim_qk must be a multiple of 8"),
    ],
)
def test_what_cannot_be_served_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs_for_model(config)
