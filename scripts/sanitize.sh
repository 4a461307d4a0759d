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
# Of all kernels, those whose names begin with our namespace.
compute-sanitizer --tool memcheck --error-exitcode 1 --kernel-regex kns=_ZN2fi "${run[@]}"
# The attention kernels pass shared memory between warps through mbarriers, which complete with
# asynchronous copies. racecheck (CUDA 13.0) does not follow those: it takes every copy and every
# read of a stage for a race. Their tests compare bits over repeats beside a disturbing kernel.
for kernel in device_plan append merge; do
  compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-regex "kns=$kernel" "${run[@]}"
done
