// The wgmma kernel's tiles in shared memory, and prepare: what a chunk needs that doesn't depend on the state. Formulas: wkv7_wgmma.cu.
#pragma once
#include "port.cuh"
#include "wkv7_document.cuh"

namespace {

constexpr int N = 64;        // head size
constexpr int kTokens = 32;  // of a chunk
constexpr int kGroupThreads = 4 * kWarpSize;
constexpr int kTile = kTokens * 2 * N;  // bytes of 32 rows
constexpr int kSquare = 2 * kTile;      // and of 64

// What a chunk has in shared memory, in bytes. Each tile has 64 numbers of bf16 in a row; two that are one operand are neighbours. In square tiles
// `g` the quarters are T | A_ak above A_rb | A_rk; in `t_transposed` and `ak_transposed` the left half has the high and the right half the low parts.
template <bool kBackward>
struct Stage {
  static constexpr int b_low = 0, k_low = kTile, a = 2 * kTile, r = 3 * kTile, b = 4 * kTile, k = 5 * kTile;
  static constexpr int w = b_low;  // where w arrives, until b' has a low part
  static constexpr int u = 6 * kTile, v = (kBackward ? 7 : 6) * kTile, z = 8 * kTile, dy = 9 * kTile, u_low = 10 * kTile, z_low = 11 * kTile;
  static constexpr int g_high = (kBackward ? 12 : 7) * kTile, g_low = g_high + kSquare;
  static constexpr int t_transposed = g_low + kSquare, ak_transposed = t_transposed + kTile;
  static constexpr int e = ak_transposed + kTile, logs = e + kSquare;
  static constexpr int kLogRow = (kTokens + 4) * 4;  // log2 of P_t, fp32, a row per channel; 4 more against bank conflicts
  static constexpr int bytes = kBackward ? logs + N * kLogRow : g_low + kSquare;
};

// What prepare's warpgroup has for itself.
struct Scratch {
  unsigned char* carry;         // [4][64] fp32: log2 of the decay over each warp's tokens
  unsigned char* diagonal;      // two blocks [16][20] of fp32: the diagonal blocks of A_ab, transposed
  unsigned char* t_transposed;  // a tile
  unsigned char* decay;         // [64] fp32: P_32
  static constexpr int kDiagonalRow = 20, kDiagonalBlock = 16 * kDiagonalRow + 16;  // the 16 keep both blocks' banks apart
  static constexpr int kDiagonalBytes = 2 * kDiagonalBlock * 4, kCarryBytes = 4 * N * 4;
};

#if PORT_WARPGROUPS

// The thread in its warpgroup, and in fragments of matrices.
struct Place {
  int thread, warp, lane, g, q;
  int row;  // byte offset of row lane % 16 of a tile, with the piece that this lane names to load_matrices and store_matrices in column 0
  DEVICE Place() {
    thread = int(threadIdx.x) % kGroupThreads;
    warp = thread / kWarpSize;
    lane = thread % kWarpSize;
    g = lane / 4, q = lane % 4;
    row = lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
  }
  // Rows 16 * rows.., columns 8 * pieces.. (even) of a tile.
  DEVICE int at(int rows, int pieces) const { return (row ^ pieces << 4) + rows * 16 * 128; }
};
DEVICE bf16* as_bf16(unsigned char* at) { return reinterpret_cast<bf16*>(at); }

// bf16 and what rounding left over.
template <int kCount>
DEVICE void split(uint32_t (&high)[kCount], uint32_t (&low)[kCount], const float* x) {
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    low[i] = pack_bf16(x[2 * i] - low_bf16(high[i]), x[2 * i + 1] - high_bf16(high[i]));
  }
}

// Of accumulators with 32 rows above 32 rows and 32 columns beside 32 columns: row t of the upper half keeps the columns before t, of the lower also t.
DEVICE void lower_triangles(float (&x)[32], const Place& p) {
  const int limit = p.warp % 2 * 16 + p.warp / 2 + p.g - 2 * p.q;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const bool keep = i / 4 * 8 + i % 2 - i / 2 % 2 * 8 < limit;
    x[i] = keep ? x[i] : 0.0f, x[16 + i] = keep ? x[16 + i] : 0.0f;
  }
}

DEVICE float log2_decay(float w) { return kDecayScale * kLog2E * fast_inverse(1.0f + fast_exp2(-kLog2E * w)); }

// x += a b of 16 x 16 pairs; what two low parts give is below fp32's use.
DEVICE void multiply_pairs(float (&x)[8], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4], const uint32_t (&b_high)[4],
                           const uint32_t (&b_low)[4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float(&to)[4] = *reinterpret_cast<float(*)[4]>(x + 4 * half);
    matrix_product(to, a_low, b_high[2 * half], b_high[2 * half + 1]);
    matrix_product(to, a_high, b_low[2 * half], b_low[2 * half + 1]);
    matrix_product(to, a_high, b_high[2 * half], b_high[2 * half + 1]);
  }
}

// T = (I - A_ab)^-1 by one warp. Its two diagonal blocks of 16 x 16 by forward substitution in fp32, a column per lane; T_21 = T_22 A_21 T_11 by pairs.
// Never by powers of A: they are huge where keys are correlated.
template <bool kBackward>
DEVICE void invert(unsigned char* stage, const Scratch& scratch, const Place& p) {
  using At = Stage<kBackward>;
  unsigned char *const transposed = scratch.t_transposed, *const high = stage + At::g_high, *const low = stage + At::g_low;
  const int column = p.lane % 16, block = p.lane / 16;
  {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = i == column ? 1.0f : 0.0f;
    const float* const a_ab = reinterpret_cast<const float*>(scratch.diagonal) + block * Scratch::kDiagonalBlock;
#pragma unroll
    for (int k = 0; k < 15; k++)
#pragma unroll
      for (int i = (k + 1) / 4 * 4; i < 16; i += 4) {
        float a[4];
        load_floats(a, a_ab + k * Scratch::kDiagonalRow + i);
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (i + e > k) x[i + e] += a[e] * x[k];
      }
    uint32_t x_high[8], x_low[8];
    split(x_high, x_low, x);
    // T^T has this column as a row.
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = p.lane * 128 + (((2 * block + i) ^ p.lane % 8) << 4);
      store16(transposed + at, {x_high[4 * i], x_high[4 * i + 1], x_high[4 * i + 2], x_high[4 * i + 3]});
      store16(transposed + (at ^ 64), {x_low[4 * i], x_low[4 * i + 1], x_low[4 * i + 2], x_low[4 * i + 3]});
    }
  }
  sync_warp();
  // The piece of this lane in an operand whose matrices come in the order of columns.
  const int crossed = (p.lane / 16 * 8 + p.lane % 8) * 128 + ((p.lane / 8 % 2 ^ p.lane % 8) << 4);
  uint32_t t_high[4], t_low[4], b_high[4], b_low[4];
  load_matrices_transposed(t_high, as_bf16(transposed + crossed));
  load_matrices_transposed(t_low, as_bf16(transposed + (crossed ^ 64)));
  store_matrices(as_bf16(high + p.at(0, 0)), t_high), store_matrices(as_bf16(low + p.at(0, 0)), t_low);
  load_matrices_transposed(t_high, as_bf16(transposed + (crossed ^ 32) + 16 * 128));
  load_matrices_transposed(t_low, as_bf16(transposed + (crossed ^ 96) + 16 * 128));
  store_matrices(as_bf16(high + p.at(1, 2)), t_high), store_matrices(as_bf16(low + p.at(1, 2)), t_low);
  float x[8] = {};
  load_matrices_transposed(b_high, as_bf16(high + p.at(1, 0))), load_matrices_transposed(b_low, as_bf16(low + p.at(1, 0)));
  multiply_pairs(x, t_high, t_low, b_high, b_low);  // T_22 A_21
  split(t_high, t_low, x);
  load_matrices(b_high, as_bf16(transposed + crossed)), load_matrices(b_low, as_bf16(transposed + (crossed ^ 64)));
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = 0.0f;
  multiply_pairs(x, t_high, t_low, b_high, b_low);
  split(t_high, t_low, x);
  store_matrices(as_bf16(high + p.at(1, 0)), t_high), store_matrices(as_bf16(low + p.at(1, 0)), t_low);
  if constexpr (kBackward)
    store_matrices_transposed(as_bf16(transposed + p.at(0, 2)), t_high), store_matrices_transposed(as_bf16(transposed + p.at(0, 6)), t_low);
}

// By one warpgroup, on a chunk of `rows` tokens that has arrived; the others become zeros that decay by 1. One of its warps, `turn`, makes T and then
// lets `ready`'s phase end.
template <bool kBackward>
DEVICE void prepare(unsigned char* stage, const Scratch& scratch, uint64_t* ready, int rows, int turn, const Place& p) {
  using At = Stage<kBackward>;
  // Of each tile a thread has two channels of eight tokens.
  const int own = p.warp * 1024 + p.lane * 4;
  const auto at = [&](int i) { return (own ^ i << 4) + i * 128; };
  if (rows < kTokens)
#pragma unroll 1
    for (int i = 0; i < 8; i++)
      if (8 * p.warp + i >= rows) {
        store4(stage + At::w + at(i), 0xff80ff80u);  // minus infinity
        store4(stage + At::a + at(i), 0), store4(stage + At::r + at(i), 0), store4(stage + At::b + at(i), 0);
        store4(stage + At::k + at(i), 0), store4(stage + At::v + at(i), 0);
        if (kBackward) store4(stage + At::dy + at(i), 0);
      }
  float log0[8], log1[8], sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t w = load4(stage + At::w + at(i));
    log0[i] = sum0 += log2_decay(low_bf16(w));
    log1[i] = sum1 += log2_decay(high_bf16(w));
  }
  store_pair(scratch.carry + p.thread * 8, sum0, sum1);
  sync_group(1, kGroupThreads);
  float before0 = 0.0f, before1 = 0.0f;
#pragma unroll
  for (int warp = 0; warp < 3; warp++) {
    const Pair more = load_pair(scratch.carry + (warp * kWarpSize + p.lane) * 8);
    before0 += warp < p.warp ? more.first : 0.0f, before1 += warp < p.warp ? more.second : 0.0f;
  }
  {
    float p0 = fast_exp2(before0), p1 = fast_exp2(before1);
    uint32_t a[8], r[8], b[8], k[8];  // loaded before anything is stored: the compiler keeps their order
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a[i] = load4(stage + At::a + at(i)), r[i] = load4(stage + At::r + at(i));
      b[i] = load4(stage + At::b + at(i)), k[i] = load4(stage + At::k + at(i));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      log0[i] += before0, log1[i] += before1;
      const float inverse0 = fast_exp2(-log0[i]), inverse1 = fast_exp2(-log1[i]);
      store4(stage + At::a + at(i), pack_bf16(low_bf16(a[i]) * p0, high_bf16(a[i]) * p1));
      p0 = fast_exp2(log0[i]), p1 = fast_exp2(log1[i]);
      store4(stage + At::r + at(i), pack_bf16(low_bf16(r[i]) * p0, high_bf16(r[i]) * p1));
      const float b0 = low_bf16(b[i]) * inverse0, b1 = high_bf16(b[i]) * inverse1, k0 = low_bf16(k[i]) * inverse0, k1 = high_bf16(k[i]) * inverse1;
      const uint32_t b_high = pack_bf16(b0, b1), k_high = pack_bf16(k0, k1);
      store4(stage + At::b + at(i), b_high), store4(stage + At::k + at(i), k_high);
      store4(stage + At::b_low + at(i), pack_bf16(b0 - low_bf16(b_high), b1 - high_bf16(b_high)));
      store4(stage + At::k_low + at(i), pack_bf16(k0 - low_bf16(k_high), k1 - high_bf16(k_high)));
    }
    if (p.warp == 3) store_pair(scratch.decay + p.lane * 8, p0, p1);
  }
  if constexpr (kBackward) {
    unsigned char* const logs = stage + At::logs + 2 * p.lane * At::kLogRow + p.warp * 32;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      store_floats(reinterpret_cast<float*>(logs + 4 * i), log0[i], log0[i + 1], log0[i + 2], log0[i + 3]);
      store_floats(reinterpret_cast<float*>(logs + At::kLogRow + 4 * i), log1[i], log1[i + 1], log1[i + 2], log1[i + 3]);
    }
  }
  fence_async_proxy();
  sync_group(1, kGroupThreads);

  // [a'; r'] [b'; k']^T, b' and k' as pairs.
  float x[32];
  {
    const uint64_t left = tile_descriptor(stage + At::a), right = tile_descriptor(stage + At::b), right_low = tile_descriptor(stage + At::b_low);
    group_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) group_product<false, false, 64>(x, left + 2 * k, right_low + 2 * k, k > 0);
#pragma unroll
    for (int k = 0; k < 4; k++) group_product<false, false, 64>(x, left + 2 * k, right + 2 * k, true);
    group_commit();
    group_wait<0>();
  }
  lower_triangles(x, p);
  if (p.warp < 2) {
    const int from = p.warp * Scratch::kDiagonalBlock + 2 * p.q * Scratch::kDiagonalRow + p.g;
#pragma unroll
    for (int i = 0; i < 8; i++)
      store4(scratch.diagonal + (from + (i / 4 * 8 + i % 2) * Scratch::kDiagonalRow + i / 2 % 2 * 8) * 4, float_to_bits(p.warp ? x[8 + i] : x[i]));
  }
  {
    uint32_t high[16], low[16];
    split(high, low, x);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      store_matrices(as_bf16(stage + At::g_high + p.at(p.warp, 2 * i)), high + 4 * i);
      store_matrices(as_bf16(stage + At::g_low + p.at(p.warp, 2 * i)), low + 4 * i);
    }
    if (kBackward && p.warp < 2) {
      unsigned char* const transposed = stage + At::ak_transposed;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        store_matrices_transposed(as_bf16(transposed + p.at(i, 2 * p.warp)), high + 8 + 4 * i);
        store_matrices_transposed(as_bf16(transposed + p.at(i, 2 * p.warp + 4)), low + 8 + 4 * i);
      }
    }
  }
  fence_async_proxy();
  sync_group(1, kGroupThreads);
  if (p.warp == turn) {
    invert<kBackward>(stage, scratch, p);
    fence_async_proxy();
    sync_warp();
    if (p.lane == 0) mbarrier_arrive(ready);
  }
}

#endif  // PORT_WARPGROUPS

}  // namespace
