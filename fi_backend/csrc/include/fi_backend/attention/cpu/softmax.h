// Online softmax over tiles of keys, for a block of query rows that lie in the lanes of vectors.
#pragma once

#include <fi_backend/attention/cpu/weight.h>
#include <fi_backend/attention/params.h>

#include <algorithm>

namespace fi::cpu {

// From q . k to a base-2 logit; fixed for a kv head.
struct LogitTransform {
  float scale;          // sm_scale * k_scale
  float soft_cap;       // 0 = off
  bool has_alibi;       // adds slope * (key - own position): write_output() moves the origin
  const uint8_t* mask;  // bits [qo_len, kv_len] of the request; nullptr = no custom mask
  int32_t kv_len;
  int32_t qo_len;

  // Where only a positive factor is applied, it can wait until after the maximum is taken.
  bool is_scale_only() const { return soft_cap == 0 && !has_alibi && mask == nullptr && scale > 0; }
};

// A block of query rows: `width` rows side by side, either a multiple of kLanes, or a divisor of
// it, in which case a vector holds several keys and every array below repeats the rows.
// Arrays have num_lanes() entries; lane i is row i % width, and key offset i / width.
struct RowBlock {
  int num_rows;  // rows that exist; the others compute on zeros
  int width;
  float* max;          // running maximum, base 2; -inf before the first key
  float* sum;          // running sum of weights, per lane
  float* alpha;        // factor for older sums when the maximum grows
  int32_t* first;      // first key the row sees, less the lane's key offset
  int32_t* last;       // last key the row sees, less the lane's key offset
  int32_t* position;   // the row's own position among the keys, less the lane's key offset
  float* slope;        // ALiBi slope * log2(e)
  int32_t some_begin;  // keys that some row sees
  int32_t some_end;
  int32_t all_begin;  // keys that every row sees
  int32_t all_end;

  int num_lanes() const { return width < kLanes ? kLanes : width; }
  int keys_per_vector() const { return width < kLanes ? kLanes / width : 1; }
};

inline VecI load_ints(const int32_t* p) { return load_bytes<VecI>(p); }

// Turn products into logits, in units of `unit`, unless that is left for later, and put -inf where
// a row does not see a key.
inline void transform_logits(const RowBlock& block, const LogitTransform& x, float unit,
                             bool is_left_for_later, float* s, int num_vectors, int32_t first_key,
                             int32_t end_key) {
  const int lanes = block.num_lanes();
  const int step = block.keys_per_vector();
  for (int c = 0; c < lanes; c += kLanes) {
    const VecI first = load_ints(block.first + c);
    const VecI last = load_ints(block.last + c);
    const VecI position = load_ints(block.position + c);
    const VecF slope = load(block.slope + c);
    VecI offset;  // of the lane's key; keys past the tile's end are masked like any other
    for (int i = 0; i < kLanes; ++i) offset[i] = (c + i) / block.width;
    for (int u = 0; u < num_vectors; ++u) {
      const int32_t key = first_key + u * step;
      float* p = s + u * lanes + c;
      VecF v = load(p);
      if (!is_left_for_later) {
        v = v * x.scale;
        if (x.soft_cap != 0) v = x.soft_cap * tanh(v / x.soft_cap);
        v = v * unit;
        if (x.has_alibi) v = fma(__builtin_convertvector(key - position, VecF), slope, v);
      }
      const VecI visible = (key >= first) & (key <= last) & (key + offset < end_key);
      store(p, select(visible, v, broadcast(-INFINITY)));
    }
  }
}

inline void apply_custom_mask(const RowBlock& block, const LogitTransform& x, float* s,
                              int num_vectors, int32_t first_key, int32_t end_key) {
  const int lanes = block.num_lanes();
  for (int u = 0; u < num_vectors; ++u) {
    for (int i = 0; i < lanes; ++i) {
      const int32_t key_offset = i / block.width;
      const int32_t key = first_key + u * block.keys_per_vector() + key_offset;
      if (key >= end_key || i % block.width >= block.num_rows) continue;
      const int64_t query = block.position[i] + key_offset - (x.kv_len - x.qo_len);
      const int64_t bit = query * x.kv_len + key;
      if ((x.mask[bit >> 3] >> (bit & 7) & 1) == 0) s[u * lanes + i] = -INFINITY;
    }
  }
}

// Make every lane of a row hold the row's maximum.
inline VecF spread_max(VecF v, int width) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = width; i < kLanes; ++i) {
    lanes[i % width] = lanes[i] > lanes[i % width] ? lanes[i] : lanes[i % width];
  }
  for (int i = width; i < kLanes; ++i) lanes[i] = lanes[i % width];
  return load(lanes);
}

inline VecF column_max(const float* column, int stride, int num_vectors) {
  VecF even = load(column);
  VecF odd = even;
  int u = 1;
  for (; u + 1 < num_vectors; u += 2) {
    even = max(even, load(column + u * stride));
    odd = max(odd, load(column + (u + 1) * stride));
  }
  if (u < num_vectors) even = max(even, load(column + u * stride));
  return max(even, odd);
}

// Turn a column of logits into weights, in place, and return their sum.
inline VecF column_weights(float* column, int stride, int num_vectors, float scale, VecF base) {
  const auto weigh = [&](int u) {
    const VecF weight = weight_exp2(load(column + u * stride) * scale - base);
    store(column + u * stride, weight);
    return weight;
  };
  VecF sum_even{};
  VecF sum_odd{};
  int u = 0;
  for (; u + 1 < num_vectors; u += 2) {
    sum_even += weigh(u);
    sum_odd += weigh(u + 1);
  }
  if (u < num_vectors) sum_even += weigh(u);
  return sum_even + sum_odd;
}

// Turn the products of one tile of keys into weights [keys, width], in place, and update the rows'
// state. Returns the number of keys that have weights: num_keys up to a whole vector.
template <class BlockVariant>
int softmax_tile(const RowBlock& block, const LogitTransform& x, const BlockVariant& variant,
                 float* s, int num_keys, int32_t first_key) {
  const int lanes = block.num_lanes();
  const int step = block.keys_per_vector();
  const int num_vectors = (num_keys + step - 1) / step;
  const int32_t end_key = first_key + num_keys;
  // In masked tiles too, or a row's bits would depend on what the rows beside it see.
  const bool is_scaled_late = BlockVariant::kScalesLate && x.is_scale_only();
  const float scale = is_scaled_late ? x.scale * kLog2e : 1.0f;
  if (!is_scaled_late || first_key < block.all_begin || end_key > block.all_end ||
      num_vectors * step != num_keys) {
    transform_logits(block, x, BlockVariant::kLogitUnit, is_scaled_late, s, num_vectors, first_key,
                     end_key);
    if (x.mask != nullptr) apply_custom_mask(block, x, s, num_vectors, first_key, end_key);
  }
  if constexpr (BlockVariant::kHasScores) variant.make_scores(block, s, num_vectors, first_key);
  if constexpr (!BlockVariant::kUsesSoftmax) {
    std::fill_n(block.alpha, lanes, 1.0f);  // scores are weights, and nobody needs their sums
    return num_vectors * step;
  }
  // Phase by phase over all columns of vectors, so that their latencies overlap.
  constexpr int kMaxColumns = 64 / kLanes;
  VecF base[kMaxColumns];
  for (int c = 0; c < lanes; c += kLanes) {
    VecF highest = column_max(s + c, lanes, num_vectors);
    if (step > 1) highest = spread_max(highest, block.width);
    base[c / kLanes] = highest;
  }
  for (int c = 0; c < lanes; c += kLanes) {
    const VecF old_max = load(block.max + c);
    const VecF new_max = max(old_max, base[c / kLanes] * scale);
    // A row that has seen no key yet keeps -inf; subtracting 0 instead makes its weights 0.
    base[c / kLanes] = select(new_max == -INFINITY, VecF{}, new_max);
    const VecF alpha = exp2(old_max - base[c / kLanes]);
    store(block.max + c, new_max);
    store(block.alpha + c, alpha);
    store(block.sum + c, load(block.sum + c) * alpha);
  }
  for (int c = 0; c < lanes; c += kLanes) {
    const VecF sum = column_weights(s + c, lanes, num_vectors, scale, base[c / kLanes]);
    store(block.sum + c, load(block.sum + c) + sum);
  }
  return num_vectors * step;
}

}  // namespace fi::cpu
