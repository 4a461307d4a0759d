// Binding of the bit packing kernel: validate, run.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/quantization/cpu/packbits.h>

namespace fi::bindings {

// x bool [any]; indptr, out_indptr int64 [num_segments + 1]; out uint8 [out_indptr[-1]].
inline void segment_packbits(TensorView x, TensorView indptr, TensorView out_indptr, TensorView out,
                             bool little, int64_t num_threads) {
  check_tensor("x", x, kDtypeOf<bool>, {kAnySize}, kCpu);
  check_tensor("indptr", indptr, kDtypeOf<int64_t>, {kAnySize}, kCpu);
  const int64_t num_segments = indptr.size(0) - 1;
  check_tensor("out_indptr", out_indptr, kDtypeOf<int64_t>, {indptr.size(0)}, kCpu);
  check_tensor("out", out, kDtypeOf<uint8_t>, {kAnySize}, kCpu);
  const int64_t* begins = static_cast<const int64_t*>(indptr.data_ptr());
  const int64_t* out_begins = static_cast<const int64_t*>(out_indptr.data_ptr());
  if (num_segments < 0 || begins[0] < 0) {
    TVM_FFI_THROW(ValueError) << "indptr: must have at least one element and start at 0 or above";
  }
  for (int64_t s = 0; s < num_segments; ++s) {
    if (begins[s + 1] < begins[s] || begins[s + 1] > x.size(0)) {
      TVM_FFI_THROW(ValueError) << "indptr: must rise to at most " << x.size(0)
                                << ", the size of x, got indptr[" << s << "] = " << begins[s]
                                << " and indptr[" << s + 1 << "] = " << begins[s + 1];
    }
    if (out_begins[s] < 0 || out_begins[s] + (begins[s + 1] - begins[s] + 7) / 8 > out.size(0)) {
      TVM_FFI_THROW(ValueError) << "out: must hold segment " << s << " from byte " << out_begins[s]
                                << ", got " << out.size(0) << " bytes";
    }
  }

  cpu::segment_packbits(static_cast<const uint8_t*>(x.data_ptr()), begins, out_begins, num_segments,
                        static_cast<uint8_t*>(out.data_ptr()), little,
                        static_cast<int>(num_threads));
}

}  // namespace fi::bindings
