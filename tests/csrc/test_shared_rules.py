"""What Python must know before anything is compiled, and kernels decide."""

from __future__ import annotations

from pathlib import Path

from fi_backend.kernels import mixed
from tests.csrc.host_program import output_of

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
    served = {tuple(map(int, line.split())) for line in output_of(LIST_DIMS, tmp_path).splitlines()}
    assert served == {(dim, dim) for dim in mixed._HEAD_DIMS}
