"""The JIT: :class:`KernelSpec` in, loaded module out.

Flow, one file per step::

    KernelSpec -> request.resolve (flags, instruction set, GPU architectures, content key)
               -> store.find      (prebuilt directory, then cache; every entry is verified)
               -> builder.ensure  (lock -> render -> build.ninja -> runner -> manifest -> publish)
               -> load            (tvm-ffi)

Importing this package imports neither tvm-ffi, jinja2 nor torch, makes no directory and starts no
process.
"""

from fi_backend.jit.builder import BuildReport, build
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.loader import load

__all__ = ["BuildReport", "KernelSpec", "build", "load"]
