"""The CUDA target through the real nvcc. No GPU is needed to compile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_backend import env
from fi_backend.errors import UnsupportedError
from fi_backend.jit import KernelSpec, arch, build, compile_commands, entry, store, toolchain
from fi_backend.jit.request import resolve

KERNEL = """\
// Scales a vector.
#include <cuda_runtime.h>
__global__ void scale_kernel(float* x) { x[threadIdx.x] *= {{ factor }}; }
extern "C" cudaError_t launch_scale(float* x, cudaStream_t stream) {
  scale_kernel<<<1, 32, 0, stream>>>(x);
  return cudaGetLastError();
}
"""
BINDING = """\
#include <cuda_runtime.h>
#include <tvm/ffi/c_api.h>
extern "C" cudaError_t launch_scale(float* x, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) int __tvm_ffi_scale(void*, const TVMFFIAny*,
                                                                      int32_t, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = launch_scale(nullptr, nullptr);
  return 0;
}
"""
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")


@pytest.fixture
def scale(tree: Path) -> KernelSpec:
    (tree / "templates" / "scale_cuda.cu.j2").write_text(KERNEL)
    (tree / "templates" / "scale_cuda_binding.cc.j2").write_text(BINDING)
    return KernelSpec(
        name="scale",
        target="cuda",
        templates=("scale_cuda.cu.j2", "scale_cuda_binding.cc.j2"),
        parameters=(("factor", 3),),
        supported_majors=(8, 9),
        root=str(tree),
    )


@needs_nvcc
def test_compiles_for_hopper_and_for_portable_ptx(
    scale: KernelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "9.0 compute_80")
    assert build([scale]).built == ("scale",)
    found = store.find(resolve(scale))
    assert found is not None
    manifest = entry.read_manifest(found)
    assert manifest.archs == ("compute_80", "9.0a")
    assert len(manifest.compilers) == 2
    assert any(Path(stamp.partition("|")[0]).name == "ptxas" for stamp in manifest.files)


@needs_nvcc
def test_clangd_gets_words_that_clang_knows(
    scale: KernelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "8.0 9.0")
    output = tmp_path / "compile_commands.json"
    assert compile_commands.write([scale], output) == 2
    words = {Path(c["file"]).suffix: c["arguments"] for c in json.loads(output.read_text())}
    assert words[".cu"][:4] == ["clang++", "-x", "cuda", "--cuda-gpu-arch=sm_90a"]
    assert not [word for word in words[".cu"] if "gencode" in word or "Xcompiler" in word]
    assert words[".cc"][0] == shutil.which("g++")


def test_unsupported_major_is_refused_before_any_compiler_is_looked_for(
    scale: KernelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "10.0")
    monkeypatch.setenv(env.NVCC.name, "/no/such/nvcc")
    with pytest.raises(UnsupportedError, match=r"scale: .*10\.0a.* 8\.x, 9\.x"):
        build([scale])


@pytest.mark.parametrize(
    ("variable", "word"),
    [(env.JIT_DEBUG, "-G"), (env.JIT_LINEINFO, "-lineinfo"), (env.EXTRA_CUDAFLAGS, "-DEXTRA")],
)
def test_variables_reach_nvcc(
    scale: KernelSpec, monkeypatch: pytest.MonkeyPatch, variable: env.Variable, word: str
) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "9.0")
    assert word not in resolve(scale).flags.cuda
    monkeypatch.setenv(variable.name, "-DEXTRA" if variable is env.EXTRA_CUDAFLAGS else "1")
    assert word in resolve(scale).flags.cuda


def test_prebuilt_module_for_more_architectures_serves_one_of_them(
    scale: KernelSpec, monkeypatch: pytest.MonkeyPatch, make_manifest: Callable[..., entry.Manifest]
) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "8.6")
    request = resolve(scale)
    assert request.archs == (arch.parse_token("8.6"),)
    entry.check_fit(make_manifest(request, archs=("8.0", "9.0a")), request)
    with pytest.raises(entry.UnfitEntryError, match=r"built for CUDA 9\.0a, not for 8\.6"):
        entry.check_fit(make_manifest(request, archs=("9.0a",)), request)


@pytest.fixture
def make_manifest() -> Callable[..., entry.Manifest]:
    def make(request: object, **values: object) -> entry.Manifest:
        fields: dict = {
            "format": entry.FORMAT,
            "spec": {},
            "source_key": request.source_key,  # type: ignore[attr-defined]
            "flags_key": request.flags_key,  # type: ignore[attr-defined]
            "level": "generic",
            "archs": (),
            "tvm_ffi": "",
            "compilers": (),
            "files": (),
            "needs": {},
            "size": 0,
            "sha256": "",
            "seconds": 0.0,
            "created": 0.0,
        }
        return entry.Manifest(**{**fields, **values})

    return make
