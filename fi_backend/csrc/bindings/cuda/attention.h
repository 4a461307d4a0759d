// Binding of the attention kernels: validate, device and stream, params, launch one line of a plan.
#pragma once

#include <bindings/attention_variant.h>
#include <bindings/cuda/launch.h>

namespace fi::bindings {

// Rows of q, K and V move in accesses of 16 bytes.
inline constexpr int64_t kRowAlignment = 16;

// The address of every row of `tensor` must be a multiple of `bytes`. All dimensions but the last
// may have any stride that keeps it so; the stride of a dimension of size 1 is never used. `remedy`
// says what to do about others; nullptr: copy.
inline void check_row_alignment(const char* name, const TensorView& tensor, int64_t bytes,
                                const char* remedy = nullptr) {
  const int64_t element = tensor.dtype().bits / 8;
  bool is_aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
  for (int32_t i = 0; i + 1 < tensor.ndim(); ++i) {
    is_aligned = is_aligned && (tensor.size(i) <= 1 || tensor.stride(i) * element % bytes == 0);
  }
  if (!is_aligned) {
    const std::string copy = std::string("pass ") + name + ".contiguous()";
    TVM_FFI_THROW(ValueError) << name << ": rows must begin at multiples of " << bytes
                              << " bytes, got an address or strides "
                              << shape_text(tensor.strides().data(), tensor.strides().size())
                              << " that do not; " << (remedy == nullptr ? copy : remedy);
  }
}

// Strides of a cache are below 64 GB: kernels count them in accesses, in 32 bits.
inline void check_strides_count(const char* name, const TensorView& tensor) {
  const int64_t limit = (kRowAlignment << 32) / (tensor.dtype().bits / 8);
  for (int32_t i = 0; i + 1 < tensor.ndim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) >= limit) {
      TVM_FFI_THROW(ValueError) << name << ": strides must be below " << limit << " elements, got "
                                << shape_text(tensor.strides().data(), tensor.strides().size())
                                << "; allocate K and V of a page nearer to each other";
    }
  }
}

// What a kernel is launched with besides its params.
struct AttentionLaunch {
  int32_t num_reqs;
  int32_t num_workers;
  int64_t num_rows;        // of q
  int64_t num_pages;       // of the caches
  int64_t partial_floats;  // in partials
  bool enable_pdl;
};

// Traits: Q, Kv, Out, Variant, kHeadDimQk and kHeadDimVo; kName; kHasRope; kTakesQueryRows;
// partial_floats(num_workers); and launch(params, AttentionLaunch, stream). Arguments as on the
// CPU, where each is described; the plan lies on the device, so that only its size can be checked,
// and causal and window_left are those it was made with.
template <class Traits, class... Members>
void run_with_members(TensorView q, TensorView k_cache, TensorView v_cache, TensorView out,
                      Optional<TensorView> lse, TensorView plan_buffer, TensorView partials,
                      TensorView qo_indptr, TensorView kv_lens, Optional<TensorView> page_indptr,
                      Optional<TensorView> page_indices, Optional<TensorView> block_table,
                      Optional<TensorView> request_rows, Optional<TensorView> alibi_slopes,
                      Optional<TensorView> sinks, Optional<TensorView> custom_mask,
                      Optional<TensorView> mask_indptr, Optional<TensorView> q_rows,
                      Optional<TensorView> first_pages, Optional<TensorView> first_rows,
                      Optional<TensorView> prior_out, Optional<TensorView> prior_lse,
                      Optional<TensorView> prior_parts, Optional<TensorView> k_scales,
                      Optional<TensorView> v_scales, double k_scale, double v_scale,
                      double sm_scale, double soft_cap, int64_t /*window_left*/, bool /*causal*/,
                      double rope_scale, double rope_theta, int64_t num_workers, bool enable_pdl,
                      typename Member<Members>::Argument... members) {
  check_cuda("q", q);
  const DLDevice device = q.device();
  const PageTableArguments pages = {page_indptr, page_indices, block_table, request_rows};
  const AttentionArguments arguments = {
      q,           k_cache,     v_cache,    out,         lse,          plan_buffer,
      partials,    qo_indptr,   kv_lens,    pages,       alibi_slopes, sinks,
      custom_mask, mask_indptr, q_rows,     first_pages, first_rows,   prior_out,
      prior_lse,   prior_parts, k_scales,   v_scales,    k_scale,      v_scale,
      sm_scale,    soft_cap,    rope_scale, rope_theta,  num_workers};
  AttentionParams params = checked_params<Traits>(arguments, device);
  check_variant_options<typename Traits::Variant>(arguments);
  set_variant<typename Traits::Variant, Members...>(params, device, members...);
  check_row_alignment("q", q, kRowAlignment);
  const char* for_caches = "allocate the cache so: a copy would miss what is appended later";
  check_row_alignment("k_cache", k_cache, kRowAlignment, for_caches);
  check_row_alignment("v_cache", v_cache, kRowAlignment, for_caches);
  check_strides_count("k_cache", k_cache);
  check_strides_count("v_cache", v_cache);
  check_row_alignment("out", out, 4 * (out.dtype().bits / 8));
  check_row_alignment("partials", partials, kRowAlignment);
  check_row_alignment("plan_buffer", plan_buffer, kPlanAlignment);
  if (partials.size(0) < Traits::partial_floats(num_workers)) {
    TVM_FFI_THROW(ValueError) << "partials: must have at least "
                              << Traits::partial_floats(num_workers) << " elements, got "
                              << partials.size(0) << "; size it with partial_floats()";
  }
  if (rope_theta != 0 && !Traits::kHasRope) {
    TVM_FFI_THROW(ValueError) << "rope_theta: must be 0 in the " << Traits::kName << " kernel, got "
                              << rope_theta << "; rotate q and k before";
  }
  if (q_rows.has_value() && !Traits::kTakesQueryRows) {
    TVM_FFI_THROW(ValueError) << "q_rows: must be None in the " << Traits::kName
                              << " kernel, which reads row i of q for row i of out";
  }

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const AttentionLaunch launch = {static_cast<int32_t>(kv_lens.size(0)),
                                  static_cast<int32_t>(num_workers),
                                  q.size(0),
                                  k_cache.size(0),
                                  partials.size(0),
                                  enable_pdl};
  check_launch(Traits::kName, Traits::launch(params, launch, current_stream(device)));
}

template <class Traits, class... Members>
constexpr auto run_for(variants::MemberList<Members...>) {
  return run_with_members<Traits, Members...>;
}

// With the arguments that the variant's members take.
template <class Traits>
inline constexpr auto run_attention = run_for<Traits>(typename Traits::Variant::Members());

}  // namespace fi::bindings
