// Gradients of bf16 weights by a CPU's matrix units (AMX):  out [M, N] = a^T b,  a [T, M], b [T, N], summed over the tokens in fp32, rounded once.
//
// PyTorch's product reads a^T across its rows, at half the rate of its other products. Here both are packed once, as the units read them: a tile is 16
// rows of 64 bytes, and an instruction adds to 16 x 16 sums the products of a tile of a^T, 16 rows of 32 tokens, and one of b, for 16 pairs of tokens
// the two numbers of each of 16 columns. Blocks of 32 x 32 sums (four tiles) need four tiles loaded for four instructions, which the second
// cache level delivers.
//   chunk    what is packed at a time: at most kDeep tokens, kTall columns of a and kWide of b
//   panel    columns of a chunk of b that stay in a thread's second cache level while the blocks of a pass by
// Every sum is made in the same order on any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>

#include "vec.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define MATRIX_UNITS 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace weight_gradient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("has_matrix_units(Tensor any) -> bool");  // a tensor, by which the dispatcher finds the device
  m.def("weight_gradient(Tensor a, Tensor b) -> Tensor");
}

#ifdef MATRIX_UNITS

// Linux gives a process the units' registers when it asks for them.
bool available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

using Number = uint16_t;

constexpr int64_t kTile = 16;  // rows of a tile, and sums in a row of one
constexpr int64_t kStep = 32;  // tokens that one instruction adds up
constexpr int64_t kBlock = 2 * kTile;
constexpr int64_t kTileSize = kTile * kStep;
constexpr int64_t kDeep = 2048, kTall = 1024, kWide = 2048;
constexpr int64_t kPanel = 1 << 19;  // numbers of b: 1 MiB

int64_t in_units(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

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
  int64_t stride, tokens, width;
};

// 32 tokens (`token` ...) of 32 columns (`column` ...) as two tiles of b, or of a^T. What is beyond the matrix counts as zero.
template <bool kTurned>
inline void pack(const Matrix& x, int64_t token, int64_t column, Number* to) {
  alignas(64) static constexpr Number kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t columns = x.width - column, tokens = x.tokens - token;
  const __mmask32 there = columns >= 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  const Number* from = x.data + token * x.stride + column;
  auto line = [&](int64_t i) { return i < tokens ? _mm512_maskz_loadu_epi16(there, from + i * x.stride) : _mm512_setzero_si512(); };
  __m512i left[16], right[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i even = line(2 * i), odd = line(2 * i + 1);
    left[i] = _mm512_permutex2var_epi16(even, low, odd);
    right[i] = _mm512_permutex2var_epi16(even, high, odd);
  }
  if constexpr (kTurned) transpose(left), transpose(right);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    _mm512_store_si512(to + i * kStep, left[i]);
    _mm512_store_si512(to + kTileSize + i * kStep, right[i]);
  }
}

// sums [32, 32] of a block, over `steps`; with kMore added to what they are
template <bool kMore>
inline void block(const Number* a, const Number* b, int64_t steps, float* sums) {
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
  for (int64_t step = 0; step < steps; ++step, a += 2 * kTileSize, b += 2 * kTileSize) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileSize, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTileSize, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kSums);
  _tile_stored(1, sums + kTile, kSums);
  _tile_stored(2, sums + kLower, kSums);
  _tile_stored(3, sums + kLower + kTile, kSums);
}

void write_block(const float* sums, Number* out, int64_t stride, int64_t rows, int64_t columns) {
  const __mmask32 there = columns >= 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  for (int64_t i = 0; i < std::min(rows, kBlock); ++i, sums += kBlock) {
    const __m512bh numbers = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums));
    _mm512_mask_storeu_epi16(out + i * stride, there, (__m512i)numbers);
  }
}

// Memory aligned to cache lines, kept between calls: page faults are expensive.
template <class T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<T*>(std::aligned_alloc(64, in_units(count * sizeof(T), 64) * 64));
      STD_TORCH_CHECK(data_ != nullptr, "weight_gradient: out of memory");
      size_ = count;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A chunk of columns and tokens, packed: block after block of columns, in each step after step of tokens
struct Packed {
  Number* data;
  int64_t first_column, blocks, steps;
  int64_t block_size() const { return steps * 2 * kTileSize; }

  template <bool kTurned>
  void fill(const Matrix& x, int64_t first_token) const {
    torch::stable::parallel_for(0, steps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t step = begin; step < end; ++step)
        for (int64_t i = 0; i < blocks; ++i)
          pack<kTurned>(x, first_token + step * kStep, first_column + i * kBlock, data + i * block_size() + step * 2 * kTileSize);
    });
  }
};

// To out, or with `partial` to its [32, 32] for each block, where they are added up if this isn't the first chunk of tokens
void multiply(const Packed& a, const Packed& b, float* partial, bool first, bool last, Number* out, int64_t M, int64_t N) {
  const int64_t panel = std::clamp<int64_t>(kPanel / b.block_size(), 1, b.blocks), panels = in_units(b.blocks, panel);
  torch::stable::parallel_for(0, panels * a.blocks, 1, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    alignas(64) float own[kBlock * kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % a.blocks, first_j = task / a.blocks * panel;
      for (int64_t j = first_j; j < std::min(b.blocks, first_j + panel); ++j) {
        float* sums = partial ? partial + (i * b.blocks + j) * kBlock * kBlock : own;
        const Number *from_a = a.data + i * a.block_size(), *from_b = b.data + j * b.block_size();
        first ? block<false>(from_a, from_b, a.steps, sums) : block<true>(from_a, from_b, a.steps, sums);
        const int64_t row = a.first_column + i * kBlock, column = b.first_column + j * kBlock;
        if (last) write_block(sums, out + row * N + column, N, M - row, N - column);
      }
    }
  });
}

void run(const Matrix& a, const Matrix& b, Number* out) {
  static thread_local Scratch<Number> packed_a, packed_b;
  static thread_local Scratch<float> partial_sums;
  const int64_t T = a.tokens, M = a.width, N = b.width;
  const int64_t steps = in_units(std::min(T, kDeep), kStep), tall = in_units(std::min(M, kTall), kBlock), wide = in_units(std::min(N, kWide), kBlock);
  Number* const to_a = packed_a.get(tall * steps * 2 * kTileSize);
  Number* const to_b = packed_b.get(wide * steps * 2 * kTileSize);
  float* const partial = T > kDeep ? partial_sums.get(tall * wide * kBlock * kBlock) : nullptr;
  for (int64_t n = 0; n < N; n += kWide)
    for (int64_t m = 0; m < M; m += kTall)
      for (int64_t t = 0; t < T; t += kDeep) {
        const int64_t here = in_units(std::min(T - t, kDeep), kStep);
        const Packed chunk_a{to_a, m, in_units(std::min(M - m, kTall), kBlock), here}, chunk_b{to_b, n, in_units(std::min(N - n, kWide), kBlock), here};
        chunk_a.fill<true>(a, t);
        if (m == 0 || partial) chunk_b.fill<false>(b, t);
        multiply(chunk_a, chunk_b, partial, t == 0, t + kDeep >= T, out, M, N);
      }
}

Tensor gradient(Tensor a_in, Tensor b_in) {
  STD_TORCH_CHECK(available(), "weight_gradient: the matrix units can't be used");
  STD_TORCH_CHECK(a_in.dim() == 2 && b_in.dim() == 2 && a_in.size(0) == b_in.size(0), "weight_gradient: needs [T, M] and [T, N]");
  STD_TORCH_CHECK(a_in.scalar_type() == ScalarType::BFloat16 && b_in.scalar_type() == ScalarType::BFloat16, "weight_gradient: needs bfloat16");
  STD_TORCH_CHECK(a_in.numel() > 0 && b_in.numel() > 0, "weight_gradient: needs matrices that are not empty");
  auto dense = [](const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); };
  auto matrix = [](const Tensor& x) { return Matrix{static_cast<const Number*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1)}; };
  const Tensor a = dense(a_in), b = dense(b_in), out = torch::stable::new_empty(a, {a.size(1), b.size(1)});
  run(matrix(a), matrix(b), static_cast<Number*>(out.mutable_data_ptr()));
  return out;
}

#else

bool available() { return false; }
Tensor gradient(Tensor a, Tensor) {
  STD_TORCH_CHECK(false, "weight_gradient: built for a processor without matrix units");
  return a;
}

#endif

bool has_matrix_units(Tensor) { return available(); }

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("has_matrix_units", TORCH_BOX(&has_matrix_units));
  m.impl("weight_gradient", TORCH_BOX(&gradient));
}

}  // namespace
}  // namespace weight_gradient
