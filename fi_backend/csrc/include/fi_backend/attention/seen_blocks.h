// Which keys some rows of an item see, of a mask that promises blocks (kSkipsTiles of variant.h).
#pragma once

#include <fi_backend/attention/variant.h>
#include <fi_backend/plan/work_pieces.h>

namespace fi {

// Query tokens of a request, each with the same heads.
struct SeeingRows {
  int32_t first_token;
  int32_t last_token;
  int32_t first_head;
  int32_t last_head;
};

// The rows from one head of a token to another of the same or a later one. Of several tokens some
// rows more: all heads of the group.
FI_HOST_DEVICE SeeingRows seeing_rows(int32_t first_token, int32_t first_head, int32_t last_token,
                                      int32_t last_head, int32_t kv_head, int32_t group_size) {
  if (first_token == last_token) return {first_token, last_token, first_head, last_head};
  return {first_token, last_token, kv_head * group_size, (kv_head + 1) * group_size - 1};
}

// What some rows see of a key.
struct Sight {
  bool some;
  bool all;
};

// Of a key within the request, and with it of its block.
template <class Variant>
FI_HOST_DEVICE Sight sight_of(const Variant& variant, const WorkPiece& piece,
                              const SeeingRows& rows, int32_t key) {
  constexpr int kBlock = kSeeAlike<Variant>;
  const int32_t origin = piece.kv_len - piece.qo_len;  // position of the request's first query
  const int32_t first = origin + rows.first_token, last = origin + rows.last_token;
  Sight sight = {false, true};
  FI_NO_UNROLL
  for (int32_t block = first / kBlock; block <= last / kBlock; ++block) {
    const int32_t at_least = block * kBlock > first ? block * kBlock : first;
    const int32_t qo_idx = (at_least < last ? at_least : last) - origin;
    FI_NO_UNROLL
    for (int32_t head = rows.first_head; head <= rows.last_head; ++head) {
      const variants::Row row = {
          piece.request, piece.qo_begin + qo_idx, qo_idx, piece.qo_len, piece.kv_len, head,
          piece.kv_head};
      const bool sees = variant.sees(variants::Pair{row, key});
      sight.some |= sees;
      sight.all &= sees;
    }
  }
  return sight;
}

}  // namespace fi
