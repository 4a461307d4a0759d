// What the bindings of outer levels of all targets share: checks of their arguments, and the params
// made from them.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/plan/outer_levels.h>

#include <tuple>

namespace fi::bindings {

inline int64_t count_group_places(int64_t num_first, int64_t num_second) {
  return num_group_places(num_first, num_second);
}

// Of a level; of none, all are None.
struct OuterLevelArguments {
  Optional<TensorView> qo_indptr;
  Optional<TensorView> kv_lens;
  Optional<TensorView> page_indptr;
};

inline OuterLevel outer_level(const OuterLevelArguments& a, int64_t first_page, DLDevice device) {
  check_tensor("kv_lens of a level", a.kv_lens.value(), kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_groups = a.kv_lens.value().size(0);
  for (const auto& [name, tensor] : {
           std::tuple{"qo_indptr of a level", &a.qo_indptr},
           {"page_indptr of a level", &a.page_indptr},
       }) {
    check_tensor(name, tensor->value(), kDtypeOf<int32_t>, {num_groups + 1}, device);
  }
  return {data_or_null<const int32_t>(a.qo_indptr), data_or_null<const int32_t>(a.kv_lens),
          data_or_null<const int32_t>(a.page_indptr), static_cast<int32_t>(num_groups),
          static_cast<int32_t>(first_page)};
}

// What is written; see OuterLevels.
struct OuterLevelOutputs {
  TensorView group_indptr;
  TensorView group_lens;
  TensorView group_tables;
  TensorView q_rows;
};

// qo_indptr: of the step. second_pages: place of the second level's pages in the list of all.
inline OuterLevels outer_levels(const TensorView& qo_indptr, const OuterLevelArguments& first,
                                const OuterLevelArguments& second, int64_t second_pages,
                                const OuterLevelOutputs& out, DLDevice device) {
  check_tensor("qo_indptr", qo_indptr, kDtypeOf<int32_t>, {kAnySize}, device);
  if (qo_indptr.size(0) < 1) {
    TVM_FFI_THROW(ValueError) << "qo_indptr must have at least one element, got none";
  }
  OuterLevels levels = {};
  levels.num_levels = second.kv_lens.has_value() ? 2 : 1;
  levels.levels[0] = outer_level(first, 0, device);
  if (levels.num_levels > 1) levels.levels[1] = outer_level(second, second_pages, device);
  const int64_t places = num_group_places(levels);
  for (const auto& [name, tensor, size] : {
           std::tuple{"group_indptr", &out.group_indptr, places + 1},
           {"group_lens", &out.group_lens, places},
           {"group_tables", &out.group_tables, places + 1},
           {"q_rows", &out.q_rows, kAnySize},
       }) {
    check_tensor(name, *tensor, kDtypeOf<int32_t>, {size}, device);
  }
  const auto ints = [](const TensorView& tensor) {
    return static_cast<int32_t*>(tensor.data_ptr());
  };
  levels.max_rows = static_cast<int32_t>(out.q_rows.size(0) / levels.num_levels);
  levels.num_rows = ints(qo_indptr) + qo_indptr.size(0) - 1;
  levels.group_indptr = ints(out.group_indptr);
  levels.group_lens = ints(out.group_lens);
  levels.group_tables = ints(out.group_tables);
  levels.q_rows = ints(out.q_rows);
  return levels;
}

}  // namespace fi::bindings
