"""Headers stand alone, and the layers of csrc stay apart."""

from __future__ import annotations

import ctypes
import glob
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fi_backend.jit import paths, toolchain

INCLUDE = paths.CSRC / "include"
HEADERS = sorted(str(path.relative_to(INCLUDE)) for path in INCLUDE.rglob("*.h*"))
DEVICE_HEADERS = sorted(str(path.relative_to(INCLUDE)) for path in INCLUDE.rglob("*.cuh"))
# Launchers and their declarations are host code of the CUDA runtime.
LAUNCH = re.compile(r"launch\.(h|cuh)$")
HOST_HEADERS = [name for name in HEADERS if not LAUNCH.search(name)]
NVRTC_HEADERS = [name for name in DEVICE_HEADERS if not LAUNCH.search(name)]

needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc; there is none")


def compile_text(command: list[str], text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@pytest.mark.parametrize("name", HOST_HEADERS)
def test_host_header_compiles_alone_without_cuda(name: str) -> None:
    cxx = toolchain.find_cxx()
    assert cxx is not None
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", "c++"]
    # CUDA's headers may be on a default path; a host header must not even name them.
    assert not re.search(r"#\s*include\s*<cuda", (INCLUDE / name).read_text())
    compile_text([*cxx, *flags, f"-I{INCLUDE}", "-"], f"#include <{name}>\n")


@needs_nvcc
@pytest.mark.parametrize("name", DEVICE_HEADERS)
def test_device_header_compiles_alone(name: str, tmp_path: Path) -> None:
    nvcc = toolchain.find_nvcc()
    assert nvcc is not None
    source = tmp_path / "header.cu"
    source.write_text(f"#include <{name}>\n")
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    flags = ["-std=c++17", "-Werror=all-warnings", *archs, f"-I{INCLUDE}", "-c"]
    compile_text([nvcc, *flags, str(source), "-o", str(tmp_path / "header.o")], "")


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    site = sysconfig.get_path("platlib")
    wheels = sorted(glob.glob(f"{site}/nvidia/*/lib/libnvrtc.so.*"))
    for name in (*wheels, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("needs NVRTC; there is none")


def nvrtc_compile(nvrtc: ctypes.CDLL, text: str, options: list[str]) -> str | None:
    """Return the log of a failed compilation, None for success."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"header.cu", 0, None, None)
    words = (ctypes.c_char_p * len(options))(*(word.encode() for word in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), words) == 0:
        return None
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode()


@pytest.fixture(scope="module")
def nvrtc_options() -> list[str]:
    nvcc = toolchain.find_nvcc()
    homes = [Path(nvcc).resolve().parent.parent] if nvcc else []
    homes += [Path("/usr/local/cuda"), Path(sysconfig.get_path("platlib"), "nvidia/cu13")]
    include = [f"-I{home}/include" for home in homes if (home / "include/cuda_fp8.h").is_file()]
    if not include:
        pytest.skip("needs the CUDA headers; there are none")
    return ["--std=c++17", "--gpu-architecture=compute_90a", f"-I{INCLUDE}", *include]


@pytest.mark.parametrize("name", NVRTC_HEADERS)
def test_device_header_compiles_with_nvrtc(
    nvrtc: ctypes.CDLL, nvrtc_options: list[str], name: str
) -> None:
    assert nvrtc_compile(nvrtc, f"#include <{name}>\n", nvrtc_options) is None


INSTANCES = """
#include <fi_backend/activation/activation.cuh>
#include <fi_backend/attention/merge.cuh>
#include <fi_backend/norm/layernorm.cuh>
#include <fi_backend/norm/rmsnorm.cuh>
#include <fi_backend/page/append.cuh>
#include <fi_backend/rope/rope.cuh>
#include <fi_backend/rope/rope_append.cuh>
namespace fi {
#define ARG(Params) (const __grid_constant__ Params)
using T = __nv_bfloat16;
using Q = __nv_fp8_e4m3;
template __global__ void merge_pair_kernel<MergeTraits<T, T, 8>> ARG(MergePairParams);
template __global__ void merge_states_kernel<MergeTraits<T, T, 8>> ARG(MergeStatesParams);
template __global__ void append_kernel<AppendTraits<T, Q, 8>> ARG(AppendParams);
template __global__ void rmsnorm_kernel<RmsNormTraits<T, T, 8, true>> ARG(RmsNormParams);
template __global__ void rmsnorm_long_kernel<RmsNormTraits<T, T, 1, true>> ARG(RmsNormParams);
template __global__ void layernorm_kernel<LayerNormTraits<T, int8_t, 8>> ARG(LayerNormParams);
template __global__ void layernorm_long_kernel<LayerNormTraits<T, Q, 1>> ARG(LayerNormParams);
template __global__ void rope_kernel<RopeTraits<T, 8, 8, true>> ARG(RopeParams);
template __global__ void rope_kernel<RopeTraits<T, 1, 1, false>> ARG(RopeParams);
template __global__ void
    rope_append_kernel<RopeAppendTraits<T, Q, T, 8, 1, 4>> ARG(RopeAppendParams);
template __global__ void
    gate_and_mul_kernel<ActivationTraits<T, Gelu, 8>> ARG(GatedActivationParams);
}
"""


def test_kernels_compile_with_nvrtc(nvrtc: ctypes.CDLL, nvrtc_options: list[str]) -> None:
    assert nvrtc_compile(nvrtc, INSTANCES, nvrtc_options) is None
    # The check can fail: a system header is what NVRTC does not have.
    assert nvrtc_compile(nvrtc, "#include <algorithm>\n", nvrtc_options) is not None
