// Prepare: everything about a chunk that doesn't need the state, by one warp. Formulas: wkv7_chunked.cu.
#pragma once
#include "chunked_fragments.cuh"
#include "wkv7_document.cuh"

#if PORT_TENSOR_CORES

namespace {

// A chunk's tiles. The raw inputs arrive in w, a, b, k and r, and are replaced.
struct Chunk {
  bf16 *w, *a, *b, *k, *r;       // [16, 64]: W, a', b', k' (forward: K), r' (forward: R)
  bf16 *v, *dy, *big_k, *bz;     // backward: V, dY, K, Bz
  bf16 *b_low, *k_low;           // low parts of b' and k'
  bf16 *q, *rbt, *m_transposed;  // [16, 16]: Q, and for backward A_rb T and M^T
  float* decay;                  // [64]: P_16
};
struct Scratch {  // a warp's own
  float* a_ab;    // [16, 16] transposed
  bf16 *t_high, *t_low;
};

DEVICE float sigmoid(float x) { return fast_divide(1.0f, 1.0f + fast_exp2(-kLog2E * x)); }

DEVICE float log2_decay(float w) { return kDecayScale * kLog2E * sigmoid(w); }

// T = (I - A)^-1 by forward substitution in fp32, a column per lane (twice: lanes 16-31 write the low parts). Never by powers of A: they are
// huge where keys are correlated.
DEVICE void invert(const Scratch& s, const Lane& l) {
  const int column = l.lane % 16;
  float x[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int k = 0; k < kTokens - 1; k++) {
#pragma unroll
    for (int i = (k + 1) / 4 * 4; i < kTokens; i += 4) {
      float a[4];
      load_floats(a, s.a_ab + k * kTokens + i);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (i + e > k) x[i + e] += a[e] * x[k];
    }
  }
  bf16* const to = l.lane < 16 ? s.t_high : s.t_low;
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    const bf16 high = from_float<bf16>(x[i]);
    to[at_small(i, column)] = l.lane < 16 ? high : from_float<bf16>(x[i] - to_float(high));
  }
}

// x += a b for pairs; what two low parts give is below fp32's use.
DEVICE void multiply_pairs(Sums& x, const Operand& a_high, const Operand& a_low, const Operand& b_high, const Operand& b_low) {
  multiply(x, a_low, b_high);
  multiply(x, a_high, b_low);
  multiply(x, a_high, b_high);
}

// The 16 x 16 lower triangle of ones as a left operand: its product with a matrix has the sums over this and all earlier rows (strict: earlier only).
DEVICE void triangle_of_ones(Operand& to, bool strict, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = l.g + 8 * (i % 2) - (strict ? 1 : 0), first = 8 * (i / 2) + 2 * l.q;
    to[i] = (row >= first ? 0x3f80u : 0u) | (row >= first + 1 ? 0x3f800000u : 0u);  // 1.0 in bf16
  }
}

// log2 of the products of decays up to t (inclusive) and t - 1 (before), for tokens t and 16 channels: sums over time are a product with a triangle of ones.
DEVICE void cumulate_decay(Sums& inclusive, Sums& before, const bf16* raw_w, int column, int rows, const Lane& l) {
  Operand ones, ones_strict, w, high, low;
  triangle_of_ones(ones, false, l), triangle_of_ones(ones_strict, true, l);
  right(w, raw_w, 0, column, l);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = 2 * l.q + 8 * (i % 2);
    const float first = token < rows ? log2_decay(low_bf16(w[i])) : 0.0f;
    const float second = token + 1 < rows ? log2_decay(high_bf16(w[i])) : 0.0f;
    high[i] = pack_bf16(first, second);
    low[i] = pack_bf16(first - low_bf16(high[i]), second - high_bf16(high[i]));
  }
  clear(inclusive);
  clear(before);
  multiply(inclusive, ones, low);
  multiply(inclusive, ones, high);
  multiply(before, ones_strict, low);
  multiply(before, ones_strict, high);
}

// By one warp, on its own chunk of `rows` tokens; the others are zeros and decay by 1.
template <bool kBackward>
DEVICE void prepare(const Chunk& c, const Scratch& s, int rows, Lane l) {
  Sums ab_transposed, ak_transposed, rb, rk;
  clear(ab_transposed), clear(ak_transposed), clear(rb), clear(rk);
#pragma unroll 1
  for (int column = 0; column < N; column += 16) {
    l.forget();
    Sums inclusive, before;
    cumulate_decay(inclusive, before, c.w, column, rows, l);
    Operand r, a, b, k, b_low, k_low;
    left(r, c.r, 0, column, l);
    left(a, c.a, 0, column, l);
    left(b, c.b, 0, column, l);
    left(k, c.k, 0, column, l);
    sync_warp();  // all have read what is overwritten below
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float p0 = fast_exp2(inclusive[i / 2][i % 2 * 2]), p1 = fast_exp2(inclusive[i / 2][i % 2 * 2 + 1]);
      const float inverse0 = fast_exp2(-inclusive[i / 2][i % 2 * 2]), inverse1 = fast_exp2(-inclusive[i / 2][i % 2 * 2 + 1]);
      const float b0 = low_bf16(b[i]) * inverse0, b1 = high_bf16(b[i]) * inverse1;
      const float k0 = low_bf16(k[i]) * inverse0, k1 = high_bf16(k[i]) * inverse1;
      r[i] = pack_bf16(low_bf16(r[i]) * p0, high_bf16(r[i]) * p1);
      a[i] = pack_bf16(low_bf16(a[i]) * fast_exp2(before[i / 2][i % 2 * 2]), high_bf16(a[i]) * fast_exp2(before[i / 2][i % 2 * 2 + 1]));
      b[i] = pack_bf16(b0, b1);
      b_low[i] = pack_bf16(b0 - low_bf16(b[i]), b1 - high_bf16(b[i]));
      k[i] = pack_bf16(k0, k1);
      k_low[i] = pack_bf16(k0 - low_bf16(k[i]), k1 - high_bf16(k[i]));
      if (i % 2 == 1 && l.g == 7) {  // row 15
        c.decay[column + 8 * (i / 2) + 2 * l.q] = p0;
        c.decay[column + 8 * (i / 2) + 2 * l.q + 1] = p1;
      }
    }
    store(c.r, r, 0, column, l), store(c.a, a, 0, column, l), store(c.b, b, 0, column, l), store(c.k, k, 0, column, l);
    store(c.b_low, b_low, 0, column, l), store(c.k_low, k_low, 0, column, l);
    multiply_by_transposed(ab_transposed, b_low, a), multiply_by_transposed(ab_transposed, b, a);
    multiply_by_transposed(ak_transposed, k_low, a), multiply_by_transposed(ak_transposed, k, a);
    multiply_by_transposed(rb, r, b_low), multiply_by_transposed(rb, r, b);
    multiply_by_transposed(rk, r, k_low), multiply_by_transposed(rk, r, k);
  }
  upper_triangle_strict(ab_transposed, l), upper_triangle_strict(ak_transposed, l);
  lower_triangle(rb, false, l), lower_triangle(rk, false, l);
#pragma unroll
  for (int i = 0; i < 4; i++)
    store8(s.a_ab + (l.g + 8 * (i % 2)) * kTokens + 8 * (i / 2) + 2 * l.q, float_to_bits(ab_transposed[i / 2][i % 2 * 2]),
           float_to_bits(ab_transposed[i / 2][i % 2 * 2 + 1]));
  sync_warp();
  invert(s, l);
  sync_warp();

  Operand high, low, t, t_low, m_high, m_low;
  Sums m_transposed, rbt;
  clear(m_transposed), clear(rbt);
  split(high, low, ak_transposed);
  right_small_transposed(t, s.t_high, l), right_small_transposed(t_low, s.t_low, l);
  multiply_pairs(m_transposed, high, low, t, t_low);
  split(m_high, m_low, m_transposed);
  split(high, low, rb);
  right_small(t, s.t_high, l), right_small(t_low, s.t_low, l);
  multiply_pairs(rbt, high, low, t, t_low);
  multiply_by_transposed(rk, low, m_high), multiply_by_transposed(rk, high, m_low), multiply_by_transposed(rk, high, m_high);  // Q
  high_part(high, rk[0], rk[1]);
  store_small(c.q, high, l);
  high_part(high, rbt[0], rbt[1]);  // A_rb T
  if constexpr (kBackward) {
    store_small(c.rbt, high, l);
    store_small(c.m_transposed, m_high, l);
    left_small_transposed(t_low, s.t_high, l);
  }
  left_small(t, s.t_high, l);
#pragma unroll 1
  for (int column = 0; column < N; column += 16) {
    l.forget();
    Operand b, b_low, a, k, k_low, packed;
    Sums x;
    right(b, c.b, 0, column, l), right(b_low, c.b_low, 0, column, l), right(a, c.a, 0, column, l);
    left(k, c.k, 0, column, l), left(k_low, c.k_low, 0, column, l);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // k' + M^T b'
      x[i / 2][i % 2 * 2] = low_bf16(k[i]) + low_bf16(k_low[i]);
      x[i / 2][i % 2 * 2 + 1] = high_bf16(k[i]) + high_bf16(k_low[i]);
    }
    multiply(x, m_high, b_low), multiply(x, m_low, b), multiply(x, m_high, b);
    high_part(packed, x[0], x[1]);
    sync_warp();  // all have read k and the low parts: forward overwrites them
    store(kBackward ? c.big_k : c.k, packed, 0, column, l);
    clear(x);
    multiply(x, t, a);
    high_part(packed, x[0], x[1]);
    store(c.w, packed, 0, column, l);
    if constexpr (kBackward) {
      clear(x);
      multiply(x, t_low, b_low), multiply(x, t_low, b);
      high_part(packed, x[0], x[1]);
      store(c.bz, packed, 0, column, l);
    } else {
      Operand r;
      left(r, c.r, 0, column, l);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i / 2][i % 2 * 2] = low_bf16(r[i]), x[i / 2][i % 2 * 2 + 1] = high_bf16(r[i]);
      multiply(x, high, a);
      high_part(packed, x[0], x[1]);
      sync_warp();
      store(c.r, packed, 0, column, l);
    }
  }
}

}  // namespace

#endif  // PORT_TENSOR_CORES
