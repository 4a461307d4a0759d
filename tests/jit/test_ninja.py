from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fi_backend.jit.flags import Flags
from fi_backend.jit.ninja import Module, compile_command, graph, link_command
from fi_backend.jit.toolchain import Toolchain

CPU = Toolchain(("/usr/bin/ccache", "/usr/bin/g++"), "/bin/ninja", None, (), (), ("g++ 12",), ())
CUDA = Toolchain(
    ("/usr/bin/g++",), "/bin/ninja", "/cuda/bin/nvcc", ("/cuda/inc",), ("/cuda/lib",), (), ()
)


def module(chain: Toolchain, *units: str, directory: str = "/tmp/b c$1") -> Module:
    return Module(
        name="norm-0123",
        directory=Path(directory),
        published=Path("/cache/norm"),
        units=units,
        flags=Flags(("-O3", '-DNAME="a b"'), ("-gencode=arch=compute_90a,code=sm_90a",), ("-lm",)),
        include_dirs=(Path("/src"), Path("/src/include")),
        tvm_ffi=Path("/ffi"),
        toolchain=chain,
        nvcc_threads=3,
    )


GOLDEN = r"""ninja_required_version = 1.5

rule cxx
  command = $cmd
  description = CXX $label
rule nvcc
  command = $cmd
  description = NVCC $label
rule link
  command = $cmd
  description = LINK $label

build /b/norm.cc.o: cxx /b/norm.cc
  cmd = /usr/bin/ccache /usr/bin/g++ -O3 '-DNAME="a b"' -ffile-prefix-map=/b=/cache/norm -I/src -I/src/include -isystem/ffi/include -c /b/norm.cc -o /b/norm.cc.o
  label = norm-0123/norm.cc
build /b/module.so: link /b/norm.cc.o
  cmd = /usr/bin/ccache /usr/bin/g++ -shared -Wl,-z,defs /b/norm.cc.o -L/ffi/lib -ltvm_ffi -lm -o /b/module.so.part && mv -f /b/module.so.part /b/module.so
  label = norm-0123
default /b/module.so
"""  # noqa: E501


def test_golden() -> None:
    assert graph([module(CPU, "norm.cc", directory="/b")]) == GOLDEN


def test_paths_are_escaped_for_ninja_and_for_the_shell() -> None:
    text = graph([module(CPU, "norm.cc")])
    assert "build /tmp/b$ c$$1/norm.cc.o: cxx /tmp/b$ c$$1/norm.cc" in text
    assert "-c '/tmp/b c$$1/norm.cc' -o '/tmp/b c$$1/norm.cc.o'" in text


def test_modules_share_one_graph_and_default() -> None:
    text = graph([module(CPU, "a.cc", directory="/1"), module(CPU, "a.cc", directory="/2")])
    assert text.count("rule cxx") == 1
    assert "default /1/module.so /2/module.so" in text


def test_flags_of_the_compiler_reach_nvcc() -> None:
    words = ("/usr/bin/ccache", "/usr/bin/g++", "-O0", "-DX=1")
    device = compile_command(module(replace(CUDA, cxx=words), "norm.cu"), "norm.cu")
    assert device[1:5] == ["-ccbin", "/usr/bin/g++", "-Xcompiler=-O0", "-Xcompiler=-DX=1"]


def test_device_code_never_sees_tvm_ffi() -> None:
    both = module(CUDA, "norm.cc", "norm.cu")
    device = compile_command(both, "norm.cu")
    assert device[:4] == ["/cuda/bin/nvcc", "-ccbin", "/usr/bin/g++", "--threads=3"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in device
    assert device[device.index("/cuda/inc") - 1] == "-isystem"  # nvcc does not take one word
    assert not any("/ffi" in word for word in device)
    host = compile_command(both, "norm.cc")
    assert host[0] == "/usr/bin/g++"
    assert "-isystem/ffi/include" in host
    assert host[host.index("/cuda/inc") - 1] == "-isystem"
    assert not any("gencode" in word for word in host)
    assert {"-L/cuda/lib", "-lcudart_static"} <= set(link_command(both))
