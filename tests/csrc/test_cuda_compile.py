"""CUDA modules compile, fit every architecture they are shipped for, and load, without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cuda_modules import (
    activation_spec,
    append_spec,
    decode_spec,
    layernorm_spec,
    merge_spec,
    mixed_spec,
    mixed_trace_spec,
    pack_masks_spec,
    page_table_spec,
    plan_spec,
    prefill_spec,
    rmsnorm_spec,
    rope_append_spec,
    rope_spec,
)
from variant_examples import EXAMPLES

from fi_backend import jit
from fi_backend.jit import paths, render, toolchain
from fi_backend.kernels import attention_cuda

pytestmark = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc; there is none")

BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
INT8 = torch.int8
BUILDERS = {
    "merge": (merge_spec, (BF16, BF16)),
    "merge_f32": (merge_spec, (F32, F32)),
    "append": (append_spec, (BF16, E4M3)),
    "rmsnorm": (rmsnorm_spec, (BF16, BF16)),
    "rmsnorm_fp8": (rmsnorm_spec, (BF16, E4M3)),
    "layernorm": (layernorm_spec, (BF16, BF16)),
    "layernorm_int8": (layernorm_spec, (F32, INT8)),
    "rope": (rope_spec, (BF16,)),
    "activation": (activation_spec, (BF16,)),
    "rope_append": (rope_append_spec, (BF16, BF16)),
    "rope_append_fp8": (rope_append_spec, (BF16, E4M3)),
    "plan": (plan_spec, ()),
    "page_table": (page_table_spec, ()),
    "pack_masks": (pack_masks_spec, ()),
    "decode": (decode_spec, (BF16, BF16)),
    "decode_fp8": (decode_spec, (BF16, E4M3)),
    "decode_d64": (partial(decode_spec, dims=(64, 64)), (BF16, BF16)),
    "decode_d64_fp8": (partial(decode_spec, dims=(64, 64)), (BF16, E4M3)),
    "prefill": (prefill_spec, (BF16, BF16)),
    "prefill_fp8": (prefill_spec, (BF16, E4M3)),
    "mixed": (mixed_spec, (BF16, BF16)),
}
# One PTX for all portable targets, as it is shipped; sm_120 has 99 KB of shared memory a block.
GENCODE = [
    "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89,sm_120]",
    "-gencode=arch=compute_90a,code=sm_90a",
]
SM90_GENCODE = GENCODE[1:]
MAX_SHARED_BYTES = 99 * 1024
# What the JIT may compile for sm_90a, sampled: each kernel of attention at each head size that has
# shapes of its own, with caches of both widths. Masks are decided on while a kernel runs, so every
# instance has its masked paths.
SM90_INSTANCES = {
    f"{name}_d{dim}_{cache}": partial(builder, (BF16, kv_dtype), dims=(dim, dim))
    for name, builder in (("decode", decode_spec), ("prefill", prefill_spec), ("mixed", mixed_spec))
    for dim in (64, 96, 128, 192, 256)
    for cache, kv_dtype in (("bf16", BF16), ("fp8", E4M3))
    if name != "mixed" or (dim < 256 and kv_dtype == BF16)
}


def nvcc_device_units(
    spec: jit.KernelSpec, directory: Path, *options: str
) -> list[tuple[Path, str]]:
    """Compile a module's ``.cu`` files as the JIT renders them.

    Returns:
        For each its output and what nvcc printed.
    """
    nvcc = toolchain.find_nvcc()
    assert nvcc is not None
    include = [f"-I{paths.CSRC}", f"-I{paths.CSRC / 'include'}"]
    command = [nvcc, "-std=c++17", "-O3", "-Werror=all-warnings", *include, *options]
    outputs = []
    for unit, text in render.render(spec).items():
        if not unit.endswith(".cu"):
            continue
        source, output = directory / unit, directory / f"{unit}.out"
        source.write_text(text)
        arguments = [*command, "-o", str(output), str(source)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append((output, done.stderr))
    return outputs


@pytest.mark.parametrize("kernel", BUILDERS)
def test_no_architecture_spills(kernel: str, tmp_path: Path) -> None:
    builder, dtypes = BUILDERS[kernel]
    assert_no_architecture_spills(builder(dtypes), tmp_path)


@pytest.mark.parametrize("instance", SM90_INSTANCES)
def test_no_attention_of_sm90_spills(instance: str, tmp_path: Path) -> None:
    spec = SM90_INSTANCES[instance]()
    assert_nothing_spills(spec, tmp_path, SM90_GENCODE, {"sm_90a"})


@pytest.mark.parametrize("builder", [attention_cuda.decode_spec, attention_cuda.prefill_spec])
@pytest.mark.parametrize("example", EXAMPLES)
def test_no_variant_spills(
    builder: Callable[..., jit.KernelSpec], example: str, tmp_path: Path
) -> None:
    types = {"q_dtype": BF16, "kv_dtype": BF16, "o_dtype": BF16}
    variant = EXAMPLES[example].variant
    assert variant is not None
    spec = builder(**types, head_dim_qk=128, head_dim_vo=128, variant=variant.code)
    # Two special functions a weight: the assembler keeps two counters of the sm_90a kernel, which
    # are read once a tile, in memory.
    assert_no_architecture_spills(spec, tmp_path, 0 if variant.use_softmax else 16)


def assert_no_architecture_spills(
    spec: jit.KernelSpec, directory: Path, allowed_bytes: int = 0
) -> None:
    architectures = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"}
    assert_nothing_spills(spec, directory, GENCODE, architectures, allowed_bytes)


def assert_nothing_spills(
    spec: jit.KernelSpec,
    directory: Path,
    gencode: list[str],
    architectures: set[str],
    allowed_bytes: int = 0,
) -> None:
    units = nvcc_device_units(spec, directory, "-Xptxas=-v", *gencode, "-c")
    marker = "Compiling entry function '"
    entries = [entry for _, report in units for entry in report.split(marker)[1:]]
    seen = set()
    for entry in entries:
        name, arch = re.match(r"(\w+)' for '(\w+)'", entry).groups()  # type: ignore[union-attr]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        assert frame is not None
        assert max(map(int, frame.groups())) <= allowed_bytes, f"{name} for {arch}: {frame[0]}"
        assert int(shared[1] if shared else 0) <= MAX_SHARED_BYTES
        seen.add(arch)
    assert seen == architectures


@pytest.mark.parametrize("kernel", BUILDERS)
def test_dependent_launch_waits_before_it_touches_memory(kernel: str, tmp_path: Path) -> None:
    """Checked on the instructions: a run on a GPU hardly ever loses this race."""
    builder, dtypes = BUILDERS[kernel]
    for ptx, _ in nvcc_device_units(builder(dtypes), tmp_path, "-arch=compute_90a", "-ptx"):
        entries = re.split(r"^\.(?:visible|weak) \.entry ", ptx.read_text(), flags=re.MULTILINE)[1:]
        assert entries
        for entry in entries:
            assert_waits_first(entry)


def assert_waits_first(entry: str) -> None:
    """Assert that every path of a kernel's PTX waits before it touches memory."""
    name = entry.partition("(")[0]
    before, found, after = entry.partition("griddepcontrol.wait")
    assert found, name
    assert not re.search(r"\b(?:ld|st|atom|red|cp)\b[\w.:]*\.global|\bret\b", before), name
    for label in re.findall(r"\bbra\S*\s+(\$\w+)", before):
        assert f"{label}:" not in after, f"{name}: a branch skips the wait"
    assert "ld.global.nc" not in entry, f"{name}: data may change while it starts"


@pytest.fixture(scope="module", params=["9.0a", "8.0"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_module_builds_loads_and_rejects(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real path, JIT and bindings, up to the first check that needs a GPU to pass."""
    monkeypatch.setenv("FI_BACKEND_CUDA_ARCH_LIST", arch)
    tag = "_for_" + arch.replace(".", "")
    specs = {name: builder(dtypes, tag) for name, (builder, dtypes) in BUILDERS.items()}
    specs["mixed_trace"] = mixed_trace_spec((BF16, BF16), tag)
    if arch == "8.0":
        del specs["mixed"], specs["mixed_trace"]  # for sm_90 alone
    jit.build(specs.values())

    x = torch.zeros(2, 4, 8, dtype=BF16)
    lse = torch.zeros(2, 4)
    names = ("merge", "append", "rmsnorm", "layernorm", "rope", "activation", "rope_append")
    modules = {name: jit.load(specs[name]) for name in names}
    merge, append, rmsnorm = (modules[name] for name in names[:3])
    with pytest.raises(ValueError, match=r"v_a: must be a CUDA tensor.*v_a\.cuda\(\)"):
        merge.merge_pair(x, lse, x, lse, x, lse, None, False)
    with pytest.raises(ValueError, match="v: must be a CUDA tensor"):
        merge.merge_states(x[None], lse[None], x, lse, False)
    cache = torch.zeros(1, 2, 4, 8, dtype=E4M3)
    slots = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="key: must be a CUDA tensor"):
        append.append_slots(x, x, cache, cache, slots, None, None, 1.0, 1.0, False)
    with pytest.raises(ValueError, match="input: must be a CUDA tensor"):
        rmsnorm.rmsnorm(x, x[0, 0], x, None, None, 1.0, 1e-6, 0.0, False)
    with pytest.raises(TypeError, match="Expected"):
        rmsnorm.rmsnorm(x, x[0, 0])
    weight, angles = torch.zeros(8), torch.zeros(4, 8)
    calls = [
        lambda: modules["layernorm"].layernorm(x, weight, weight, x, None, 1.0, 1e-6, False),
        lambda: modules["rope"].rope_cos_sin(x, x, x, x, slots, angles, 8, False, False),
        lambda: modules["rope"].rope(
            x, x, x, x, slots, None, None, 8, False, 1.0, 1e4, 0.0, 0.0, False
        ),
        lambda: modules["activation"].silu_and_mul(x, x, False),
        lambda: modules["rope_append"].rope_append_slots(
            *(x, x, x, x, slots, angles, cache, cache, slots, False, None, None, 1e-6, 0.0),
            *(None, None, 1.0, 1.0, False),
        ),
        lambda: modules["rope_append"].rope_append_positions(
            *(x, x, x, x, slots, angles, cache, cache, slots, slots, slots, slots, False),
            *(None, None, 1e-6, 0.0, None, None, 1.0, 1.0, False),
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"(input|q): must be a CUDA tensor"):
            call()
    plan = jit.load(specs["plan"])
    lens = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="plan_buffer: must be a CUDA tensor"):
        plan.device_plan(*(lens, lens, lens[1:], 8, 2, 64, 64, True, -1, 4, 0, *[False] * 5))
    prefill, decode = jit.load(specs["prefill"]), jit.load(specs["decode"])
    num_sms, tile_rows, ends = 132, 256, 2
    assert prefill.partial_floats(3 * num_sms) == num_sms * ends * tile_rows * (128 + 2)
    assert attention_cuda.few_rows_limit(128, 128) == decode.few_rows_limit()
    # The planner counts for modules that nobody has compiled.
    has_mixed = "mixed" in specs
    both = [jit.load(specs["mixed"])] if has_mixed else [prefill, decode]
    for has_chunks, name in enumerate(("partial_floats", "invariant_partial_floats")):
        counted = [module.get_function(name)(3 * num_sms) for module in both]
        types = (128, 128, 3 * num_sms, bool(has_chunks))
        assert plan.partial_floats(*types, False, has_mixed) == max(counted)
        assert plan.partial_floats(*types, True, False) == prefill.partial_floats(3 * num_sms)
    for name in {"mixed", "mixed_trace"} & set(specs):
        has_trace = hasattr(jit.load(specs[name]), "take_block_traces")
        assert has_trace == (name == "mixed_trace")
    with pytest.raises(ValueError, match="q: must be a CUDA tensor"):
        decode.run(
            x, x, x, x, None, x, x, x, x, *[None] * 16, *[1.0] * 4, -1, False, 1.0, 0.0, 1, False
        )
