"""What Python must know before anything is compiled, and kernels decide."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fi_backend.jit import paths, toolchain
from fi_backend.kernels import mixed

LIST_DIMS = """\
#include <fi_backend/attention/many_rows_shape.h>

#include <cstdio>

int main() {
  for (int qk = 8; qk <= 512; qk += 8) {
    for (int vo = 8; vo <= 512; vo += 8) {
      if (fi::has_mixed_rows_dims(qk, vo)) std::printf("%d %d\\n", qk, vo);
    }
  }
}
"""


def test_head_dims_of_the_kernel_for_both_lines(tmp_path: Path) -> None:
    cxx = toolchain.find_cxx()
    assert cxx is not None
    source, program = tmp_path / "dims.cc", tmp_path / "dims"
    source.write_text(LIST_DIMS)
    include = f"-I{paths.CSRC / 'include'}"
    subprocess.run([*cxx, "-std=c++17", include, str(source), "-o", str(program)], check=True)
    listed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    served = {tuple(map(int, line.split())) for line in listed.splitlines()}
    assert served == {(dim, dim) for dim in mixed._HEAD_DIMS}
