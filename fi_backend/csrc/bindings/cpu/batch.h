// Check the values of a step's metadata, which lie on the host, before a plan or a kernel uses
// them.
#pragma once

#include <bindings/checks.h>

namespace fi::bindings {

struct HostInts {
  const int32_t* data;
  int64_t size;

  HostInts(const char* name, const TensorView& tensor, int64_t wanted_size) {
    check_tensor(name, tensor, kDtypeOf<int32_t>, {wanted_size}, {kDLCPU, 0});
    data = static_cast<const int32_t*>(tensor.data_ptr());
    size = tensor.size(0);
  }
  int64_t operator[](int64_t i) const { return data[i]; }
};

inline void check_offsets(const char* name, const HostInts& offsets) {
  if (offsets[0] < 0) {
    TVM_FFI_THROW(ValueError) << name << "[0] must be at least 0; got " << offsets[0];
  }
  for (int64_t i = 0; i + 1 < offsets.size; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      TVM_FFI_THROW(ValueError) << name << " must never decrease; got " << name << "[" << i
                                << "] = " << offsets[i] << " and " << name << "[" << i + 1
                                << "] = " << offsets[i + 1];
    }
  }
}

// qo_indptr int32 [num_reqs + 1], kv_lens int32 [num_reqs], page_indptr int32 [num_reqs + 1].
// max_kv_len: tokens that a row of the block table holds; -1 = there is none. num_page_indices: -1
// = there are none. max_qo_len: most query rows of a request; -1 = any number. Returns the number
// of query rows.
inline int64_t check_batch(TensorView qo_indptr, TensorView kv_lens, int64_t max_kv_len,
                           Optional<TensorView> page_indptr, int64_t num_page_indices,
                           int64_t page_size, int64_t max_qo_len) {
  const HostInts lens("kv_lens", kv_lens, kAnySize);
  const HostInts rows("qo_indptr", qo_indptr, lens.size + 1);
  if (rows[0] != 0) TVM_FFI_THROW(ValueError) << "qo_indptr[0] must be 0; got " << rows[0];
  check_offsets("qo_indptr", rows);
  for (int64_t r = 0; r < lens.size; ++r) {
    if (max_qo_len >= 0 && rows[r + 1] - rows[r] > max_qo_len) {
      TVM_FFI_THROW(ValueError) << "max_qo_len must be at least the query rows of every request; "
                                << "got " << max_qo_len << ", and request " << r << " has "
                                << rows[r + 1] - rows[r];
    }
    if (lens[r] < 0) {
      TVM_FFI_THROW(ValueError) << "kv_lens must be at least 0; got kv_lens[" << r
                                << "] = " << lens[r];
    }
    if (max_kv_len >= 0 && lens[r] > max_kv_len) {
      TVM_FFI_THROW(ValueError) << "kv_lens must be at most " << max_kv_len
                                << ", the tokens its page table row can hold; got kv_lens[" << r
                                << "] = " << lens[r];
    }
  }
  if (!page_indptr.has_value()) return rows[lens.size];
  const HostInts pages("page_indptr", page_indptr.value(), lens.size + 1);
  check_offsets("page_indptr", pages);
  if (num_page_indices >= 0 && pages[lens.size] > num_page_indices) {
    TVM_FFI_THROW(ValueError) << "page_indices must have at least page_indptr[-1] = "
                              << pages[lens.size] << " entries; got " << num_page_indices;
  }
  for (int64_t r = 0; r < lens.size; ++r) {
    const int64_t room = (pages[r + 1] - pages[r]) * page_size;
    if (lens[r] > room) {
      TVM_FFI_THROW(ValueError) << "kv_lens[" << r << "] must be at most " << room
                                << ", the tokens its pages hold; got " << lens[r];
    }
  }
  return rows[lens.size];
}

}  // namespace fi::bindings
