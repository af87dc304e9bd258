// Products of small matrices held in the first cache level, blocked in registers: all that wkv7's chunks are made of.
// Matrices are row-major; all sizes are multiples of 16.
#pragma once
#include <cstdint>

#include "vec.h"

namespace small {

using vec::Float;
using vec::kLanes;

// Rows of memory that will be needed soon. Asked for all at once they would block the processor's own loads, so each block of a product
// asks for three.
class Fetch {
 public:
  // `rows` rows of `bytes` bytes, the first at `first`, `stride` bytes apart
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows > 0) areas_[count_++] = {static_cast<const char*>(first), stride, rows, bytes};
  }
  // Asks for the next three.
  void some() {
    for (int64_t i = 0; i < 3 && area_ < count_; ++i) {
      Area& area = areas_[area_];
      for (int64_t at = 0; at < area.bytes; at += vec::kLine) __builtin_prefetch(area.first + at, 0, 2);
      area.first += area.stride;
      if (--area.rows == 0) ++area_;
    }
  }

 private:
  struct Area {
    const char* first;
    int64_t stride, rows, bytes;
  };
  Area areas_[20];
  int64_t count_ = 0, area_ = 0;
};

// to = (from + A B) * scale
struct Product {
  float* to;          // [rows, columns], `stride` floats from row to row; may be `from`
  const float* from;  // laid out like `to`, or null: zeros
  int64_t stride, rows, columns;
  const float* a;  // element (i, k) is a[i * a_row + k * a_inner]
  int64_t a_row, a_inner;
  const float* b;  // [inner, columns]
  int64_t b_stride, inner;
  const float *row_scale = nullptr, *column_scale = nullptr;  // at most one of them
};

constexpr int64_t kSumTerms = 64;  // Sums are closed every so many terms: shorter chains of additions lose less.

template <int R, int V>
__attribute__((always_inline)) inline void block(const Product& p, int64_t row, int64_t column, Fetch& fetch) {
  const int64_t stride = p.stride, a_row = p.a_row, a_inner = p.a_inner, b_stride = p.b_stride;
  const float *a = p.a + row * a_row, *b = p.b + column, *row_scale = p.row_scale, *column_scale = p.column_scale;
  float* const to = p.to + row * stride + column;
  Float c[R][V] = {};
  if (p.from) {
    const float* from = p.from + row * stride + column;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, from += stride)
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) c[r][u] = vec::load(from + u * kLanes);
  }
  for (int64_t done = 0;;) {
    fetch.some();
    const int64_t end = p.inner - done < kSumTerms ? p.inner : done + kSumTerms;
    for (; done < end; ++done, a += a_inner, b += b_stride) {
      Float x[V];
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) x[u] = vec::load(b + u * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Float y = vec::splat(a[r * a_row]);
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) c[r][u] += x[u] * y;
      }
    }
    if (done > kSumTerms) {
      const float* sums = to;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, sums += stride)
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) c[r][u] += vec::load(sums + u * kLanes);
    }
    if (done >= p.inner) break;
    float* sums = to;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, sums += stride)
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) vec::store(sums + u * kLanes, c[r][u]), c[r][u] = Float{};
  }
  if (row_scale) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) c[r][u] *= vec::splat(row_scale[row + r]);
  }
  if (column_scale) {
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) {
      const Float scale = vec::load(column_scale + column + u * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][u] *= scale;
    }
  }
  float* at = to;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, at += stride)
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) vec::store(at + u * kLanes, c[r][u]);
}

template <int R, int V>
__attribute__((always_inline)) inline int64_t columns_of_blocks(const Product& p, int64_t column, Fetch& fetch) {
  for (; p.columns - column >= V * kLanes; column += V * kLanes)
    for (int64_t row = 0; row < p.rows; row += R) block<R, V>(p, row, column, fetch);
  return column;
}

// As many accumulators as hide the latency of a multiply-add and leave room for operands. Inlined: strides that the caller knows become part
// of the instructions, which saves a fifth of the time.
__attribute__((always_inline)) inline void multiply(const Product& p, Fetch& fetch) {
  int64_t column = 0;
  if constexpr (vec::kRegisters == 32) {
    column = columns_of_blocks<4, 4>(p, column, fetch);
    column = columns_of_blocks<8, 2>(p, column, fetch);
    columns_of_blocks<16, 1>(p, column, fetch);
  } else {
    column = columns_of_blocks<4, 2>(p, column, fetch);
    columns_of_blocks<8, 1>(p, column, fetch);
  }
}

// to [columns, rows] = from [rows, columns] transposed; with `past_caches`, not through the caches, if `to` is aligned to a cache line
__attribute__((noinline)) inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                                                int64_t to_stride, bool past_caches = false) {
  past_caches = past_caches && vec::starts_line(to);
  for (int64_t column = 0; column < columns; column += 4)
    for (int64_t row = 0; row < rows; row += kLanes) {
      const float* p = from + row * from_stride + column;
      Float v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = vec::load_fours(p + i * from_stride, 4 * from_stride);
      vec::transpose_fours(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* at = to + (column + i) * to_stride + row;
        past_caches ? vec::stream(at, v[i]) : vec::store(at, v[i]);
      }
    }
}

// out = sum over the rows of A * B, element by element
__attribute__((noinline)) inline void sum_of_products(const float* A, const float* B, int64_t rows, int64_t columns, float* out) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    Float sum[4] = {};
    for (int64_t row = 0; row < rows; row += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (row + i) * columns + column;
        sum[i] += vec::load(A + at) * vec::load(B + at);
      }
    vec::store(out + column, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

}  // namespace small
