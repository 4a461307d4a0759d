"""What Python must know before anything is compiled, and kernels decide."""

from __future__ import annotations

from pathlib import Path

from fi_backend.kernels import attention_cuda, mixed
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


LIST_LIMITS = """\
#include <fi_backend/attention/few_rows_shape.h>

#include <cstdio>

int main() {
  for (int qk = 8; qk <= 512; qk += 8) {
    for (int vo = 8; vo <= 512; vo += 8) {
      std::printf("%d %d %d\\n", qk, vo, fi::cuda_few_rows_limit(qk, vo));
    }
  }
}
"""


def test_limit_of_few_rows(tmp_path: Path) -> None:
    """Of head sizes alone: modules of all dtypes and architectures go by the C++ function."""
    limits = [tuple(map(int, x.split())) for x in output_of(LIST_LIMITS, tmp_path).splitlines()]
    assert len(limits) == 64**2
    assert {limit for _, _, limit in limits} == {16, 32}
    for qk, vo, limit in limits:
        assert attention_cuda.few_rows_limit(qk, vo) == limit, (qk, vo)
