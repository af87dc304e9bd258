// The op that packs a bf16 matrix into the layout of packed.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "packed.h"

namespace packed {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) { m.def("pack(Tensor matrix) -> Tensor"); }

constexpr int64_t kRareness = 256;      // at most one exception among so many numbers: with more, packing would not save time
constexpr int64_t kLeastWork = 1 << 16;  // numbers that are worth a thread

// The base whose neighbours most numbers have, from a sample of the rows.
int best_base(const uint16_t* matrix, int64_t rows, int64_t columns) {
  int64_t counts[128] = {};
  const int64_t apart = std::max<int64_t>(1, rows / 256);
  for (int64_t r = 0; r < rows; r += apart)
    for (int64_t c = 0; c < columns; ++c) ++counts[upper(matrix[r * columns + c])];
  int64_t most = -1;
  int best = 0;
  for (int base = 0; base <= kMostBase; ++base) {
    int64_t covered = 0;
    for (int i = 1; i <= kNeighbours; ++i) covered += counts[base + i];
    if (covered > most) most = covered, best = base;  // the least of equals: what is rare is rather small than large
  }
  return best;
}

int32_t count_exceptions(const uint16_t* row, int64_t columns, int base) {
  int32_t found = 0;
  for (int64_t c = 0; c < columns; ++c) found += !coded(row[c], base);
  return found;
}

float value_of(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void pack_row(const uint16_t* row, int64_t columns, int base, uint8_t* out) {
  for (int64_t group = 0; group < columns; group += kGroup, out += kGroupBytes) {
    uint8_t low[kGroup], code[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) {
      const uint16_t bits = row[group + j];
      const bool fits = coded(bits, base);
      low[j] = fits ? bits & 255 : 0;
      code[j] = fits ? (bits >> 15) * 8 + (upper(bits) ? upper(bits) - base : 0) : 0;
    }
    for (int v = 0; v < 4; ++v)
      for (int q = 0; q < 4; ++q)
        for (int d = 0; d < 4; ++d) {
          const int j = 16 * v + 4 * q + d, place = 16 * q + 8 * (v / 2) + 2 * d + v % 2;
          out[place] = low[j], out[kHalf + place] = low[kHalf + j];
          out[2 * kHalf + place] = code[j] | code[kHalf + j] << 4;
        }
  }
}

void list_exceptions(const uint16_t* row, int64_t columns, int base, Exception* exceptions) {
  for (int64_t c = 0; c < columns; ++c)
    if (!coded(row[c], base)) *exceptions++ = {static_cast<int32_t>(c), value_of(row[c])};
}

// uint8 [bytes] of a bf16 matrix [rows, columns]; [0] where it wouldn't pay.
Tensor pack(Tensor matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous() && matrix.scalar_type() == ScalarType::BFloat16,
                  "pack: the matrix must be bfloat16 and contiguous");
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const auto* from = static_cast<const uint16_t*>(matrix.const_data_ptr());
  const Tensor none = torch::stable::new_empty(matrix, {0}, ScalarType::Byte);
#if !defined(PACKED_PAYS)
  return none;
#endif
  if (rows == 0 || columns == 0 || columns % kGroup) return none;
  const int base = best_base(from, rows, columns);
  std::vector<int32_t> first(rows + 1, 0);
  const int64_t grain = std::max<int64_t>(1, kLeastWork / columns);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) first[r + 1] = count_exceptions(from + r * columns, columns, base);
  });
  for (int64_t r = 0; r < rows; ++r) first[r + 1] += first[r];
  const int64_t exceptions = first[rows];
  if (exceptions > rows * columns / kRareness) return none;

  Tensor out = torch::stable::new_empty(matrix, {total_bytes(rows, columns, exceptions)}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Header header{rows, columns, exceptions, base};
  std::memcpy(bytes, &header, sizeof header);
  std::memcpy(bytes + sizeof header, first.data(), 4 * first.size());
  auto* listed = reinterpret_cast<Exception*>(bytes + sizeof header + 4 * first.size());
  uint8_t* packed_rows = bytes + rows_offset(rows, exceptions);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_row(from + r * columns, columns, base, packed_rows + r * row_bytes(columns));
      if (first[r] < first[r + 1]) list_exceptions(from + r * columns, columns, base, listed + first[r]);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) { m.impl("pack", TORCH_BOX(&pack)); }

}  // namespace
}  // namespace packed
