#!/usr/bin/env bash
# memcheck and racecheck of compute-sanitizer over a few GPU tests that launch every attention,
# merge and append kernel. Needs an NVIDIA GPU and the CUDA toolkit.
#
#   scripts/sanitize.sh [tests]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
tests=(
  tests/kernels/test_device_plan.py::test_garbage_terminates
  tests/test_attention_cuda.py::test_a_mixed_batch_matches_the_reference
  tests/kernels/test_append_cuda.py::test_nothing_outside_is_written
  tests/kernels/test_append_cuda.py::test_page_ids_are_read_only_where_there_are_some
  tests/kernels/test_merge_cuda.py::test_in_place_with_mask
  tests/kernels/test_merge_cuda.py::test_strided_views_and_no_lse
)
[ "$#" -eq 0 ] || tests=("$@")
run=("$python" -m pytest -q -m gpu "${tests[@]}")

"${run[@]}"  # compiles what is missing, without the tools
# Each tensor gets an allocation of its own, so that memcheck sees where it ends.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
  # Of all kernels, those whose names begin with our namespace.
  compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=_ZN2fi "${run[@]}"
done
