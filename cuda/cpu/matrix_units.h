// A CPU's matrix units (AMX) for bf16 products: tiles, packing and blocks of sums. What uses them is compiled where MATRIX_UNITS is defined.
//
// A tile is 16 rows of 64 bytes. An instruction adds to 16 x 16 sums the products of a tile of the left operand, 16 rows of 32 numbers, and one of
// the right, for 16 pairs of rows the two numbers of each of 16 columns. Blocks of 32 x 32 sums (four tiles) need four tiles loaded for four
// instructions, which the second cache level delivers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "vec.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define MATRIX_UNITS 1
#include <sys/syscall.h>
#include <unistd.h>

namespace matrix_units {

// Linux gives a process the units' registers when it asks for them.
inline bool available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

using Number = uint16_t;

constexpr int64_t kTile = 16;  // rows of a tile, and sums in a row of one
constexpr int64_t kStep = 32;  // products that one instruction adds up in a sum
constexpr int64_t kBlock = 2 * kTile;
constexpr int64_t kTileSize = kTile * kStep;
constexpr int64_t kPairSize = 2 * kTileSize;  // numbers of an operand in one step of a block
constexpr int64_t kPanel = 1 << 19;           // numbers that stay in a thread's second cache level: 1 MiB

inline int64_t in_units(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTile;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// 16 x 16 pairs of numbers transposed
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(v[i + j], v[i + 4 + j], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

struct Matrix {
  const Number* data;
  int64_t stride, rows, columns;
};

// As masks of 32 numbers: those that a row has from `column` on.
inline __mmask32 first(int64_t columns) { return columns >= 32 ? ~__mmask32{0} : columns <= 0 ? __mmask32{0} : (__mmask32{1} << columns) - 1; }

inline void store_tiles(const __m512i (&upper)[16], const __m512i (&lower)[16], Number* to) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) {
    _mm512_store_si512(to + i * kStep, upper[i]);
    _mm512_store_si512(to + kTileSize + i * kStep, lower[i]);
  }
}

// 32 rows (`row` ...) of 32 columns (`column` ...) as two tiles of the right operand; kTurned: of the left one, whose rows are x's columns. What is
// beyond the matrix counts as zero, here and below.
template <bool kTurned>
inline void pack_pairs(const Matrix& x, int64_t row, int64_t column, Number* to) {
  alignas(64) static constexpr Number kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t rows = x.rows - row;
  const __mmask32 there = first(x.columns - column);
  const Number* from = x.data + row * x.stride + column;
  auto line = [&](int64_t i) { return i < rows ? _mm512_maskz_loadu_epi16(there, from + i * x.stride) : _mm512_setzero_si512(); };
  __m512i left[16], right[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i even = line(2 * i), odd = line(2 * i + 1);
    left[i] = _mm512_permutex2var_epi16(even, low, odd);
    right[i] = _mm512_permutex2var_epi16(even, high, odd);
  }
  if constexpr (kTurned) transpose(left), transpose(right);
  store_tiles(left, right, to);
}

// 32 rows of 32 columns as two tiles of the left operand; kTurned: of the right one, whose columns are x's rows
template <bool kTurned>
inline void pack_rows(const Matrix& x, int64_t row, int64_t column, Number* to) {
  const int64_t rows = x.rows - row;
  const __mmask32 there = first(x.columns - column);
  const Number* from = x.data + row * x.stride + column;
  auto line = [&](int64_t i) { return i < rows ? _mm512_maskz_loadu_epi16(there, from + i * x.stride) : _mm512_setzero_si512(); };
  __m512i upper[16], lower[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) upper[i] = line(i);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) lower[i] = line(16 + i);
  if constexpr (kTurned) transpose(upper), transpose(lower);
  store_tiles(upper, lower, to);
}

// Where the 32 x 32 numbers of each step of a block are: rows of a tile `stride` bytes apart, the second tile `lower` numbers after the first
struct Left {
  const Number* data;
  int64_t stride, lower, step;
};
inline Left in_tiles(const Number* data) { return {data, 64, kTileSize, kPairSize}; }

// sums [32, 32] of a block, over `steps`; with kMore added to what they are. each(): called once a step
template <bool kMore, class F>
inline void block(Left a, const Number* b, int64_t steps, float* sums, const F& each) {
  constexpr int64_t kSums = kBlock * sizeof(float), kLower = kTile * kBlock;
  if constexpr (kMore) {
    _tile_loadd(0, sums, kSums);
    _tile_loadd(1, sums + kTile, kSums);
    _tile_loadd(2, sums + kLower, kSums);
    _tile_loadd(3, sums + kLower + kTile, kSums);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a.data += a.step, b += kPairSize) {
    _tile_loadd(4, a.data, a.stride);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileSize, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.data + a.lower, a.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    each();
  }
  _tile_stored(0, sums, kSums);
  _tile_stored(1, sums + kTile, kSums);
  _tile_stored(2, sums + kLower, kSums);
  _tile_stored(3, sums + kLower + kTile, kSums);
}

// A block's sums on their way to memory, rounded: a few rows at a time, while the units compute the next block
class Writer {
 public:
  void start(const float* sums, Number* to, int64_t stride, int64_t rows, int64_t columns, bool stream) {
    sums_ = sums, to_ = to, stride_ = stride, left_ = std::min(rows, kBlock), there_ = first(columns);
    // Past the caches, where memory isn't read before it is overwritten: for whole cache lines.
    stream_ = stream && columns >= kBlock && vec::starts_line(to) && stride % kBlock == 0;
  }
  void write(int64_t rows) {
    for (; rows > 0 && left_ > 0; --rows, --left_, sums_ += kBlock, to_ += stride_) {
      const auto numbers = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums_ + kTile), _mm512_load_ps(sums_));
      stream_ ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to_), numbers) : _mm512_mask_storeu_epi16(to_, there_, numbers);
    }
  }

 private:
  const float* sums_ = nullptr;
  Number* to_ = nullptr;
  int64_t stride_ = 0, left_ = 0;
  __mmask32 there_ = 0;
  bool stream_ = false;
};

// Memory aligned to cache lines, kept between calls: page faults are expensive. Null where there is none left.
template <class T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<T*>(std::aligned_alloc(64, in_units(count * sizeof(T), 64) * 64));
      if (data_ != nullptr) size_ = count;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace matrix_units
#endif
