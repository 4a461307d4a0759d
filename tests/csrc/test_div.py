"""Division of indices by what a launcher has prepared."""

from __future__ import annotations

from pathlib import Path

from tests.csrc.host_program import output_of

COUNT_WRONG = """\
#include <fi_backend/common/div.h>

#include <cstdio>
#include <initializer_list>

// At `index` and at the ends of its quotient and of the range.
static int count_wrong(uint32_t divisor, uint32_t index) {
  constexpr int64_t kEnd = int64_t{1} << 31;
  const fi::FastDivider divide = fi::make_fast_divider(divisor);
  const int64_t first = int64_t{index} / divisor * divisor;
  int wrong = 0;
  for (int64_t i : {first - 1, first, first + 1, int64_t{index}, first + divisor, kEnd - 1}) {
    if (i < 0 || i >= kEnd) continue;
    wrong += divide(uint32_t(i)) != uint32_t(i) / divisor;
  }
  return wrong;
}

int main() {
  int wrong = 0;
  uint32_t random = 1;
  const auto next = [&] { return (random = random * 1664525u + 1013904223u) >> 1; };
  for (uint32_t divisor = 1; divisor <= 5000; ++divisor) {
    for (int i = 0; i < 20; ++i) wrong += count_wrong(divisor, next());
  }
  for (int shift = 0; shift < 31; ++shift) {
    for (uint32_t divisor : {(1u << shift) - 1, 1u << shift, (1u << shift) + 1, next() >> shift}) {
      if (divisor == 0) continue;
      for (int i = 0; i < 1000; ++i) wrong += count_wrong(divisor, next());
    }
  }
  std::printf("%d wrong\\n", wrong);
}
"""


def test_fast_divider_divides(tmp_path: Path) -> None:
    assert output_of(COUNT_WRONG, tmp_path) == "0 wrong\n"
