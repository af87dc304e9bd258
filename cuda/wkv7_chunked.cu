// WKV7 on tensor cores: bf16, head size 64, sm_80 and later. Same mathematics and contract as wkv7_recurrent.cu:
//
//   decay_t = exp(-exp(-0.5) sigmoid(w_t)),  sa_t = S_{t-1} a_t
//   S_t = S_{t-1} diag(decay_t) + sa_t b_t^T + v_t k_t^T,  y_t = S_t r_t           S [value, key]
//
// 16 tokens are a chunk. With P_t the product of a chunk's decays up to t, the decays leave the recurrence,
//   a' = a P_{t-1},  r' = r P_t,  b' = b / P_t,  k' = k / P_t                       rows t of 16 x 64 matrices
// and a chunk is a few matrix products. With the lower triangles (strict for a', diagonal included for r')
//   A_ab = a' b'^T   A_ak = a' k'^T   A_rb = r' b'^T   A_rk = r' k'^T   T = (I - A_ab)^-1   M = T A_ak
//   W = T a'      K = k' + M^T b'     R = r' + A_rb W      Q = A_rk + A_rb M            ("prepared", independent of S)
//   Y = R S^T + Q V      S <- (S + (S W^T) b' + V^T K) diag(P_16)
// Here sa never multiplies a large sum: K and R are sums that cancel where keys are correlated, formed before anything is rounded.
// Backward, from dY and D = dS at the chunk's end, with E = D diag(P_16), Bz = T^T b', U = sa of the chunk = W S^T + M V:
//   Z = Bz E^T + (A_rb T)^T dY      dV = K E^T + Q^T dY      dS at the chunk's start = E + Z^T a' + dY^T r'
//   da' = Z S + (Z U^T) b' + (Z V^T) k'         dr' = dY S + (dY U^T) b' + (dY V^T) k'
//   db' = U E + (Z U^T)^T a' + (dY U^T)^T r'    dk' = V E + (Z V^T)^T a' + (dY V^T)^T r'   (products in brackets: lower triangles)
//   dlog(decay_t) = colsum(E * S) + sum over s < t of (b' (U E) + k' (V E))_s + sum over s > t of (a' da')_s
//                   + sum over s >= t of (r' dr' - b' (db' - U E) - k' (dk' - V E))_s
//
// Who owns what, in a block of 4 warps that walks over one head of one document by segments of kChunks chunks:
//   prepare   a warp per chunk, nothing shared between warps
//   recur     a warp per 16 value rows; its rows of S (or D) stay in registers as accumulators of the matrix instruction, which are operands
//             of the next one as they lie; no barrier inside a segment (forward)
//   collect   (backward) a warp per 16 key columns, the sums over all value rows
// Forward keeps S at the start of each segment (fp16 with a scale per lane: 181 bytes per token and head); backward recomputes the rest.
//
// bf16 holds 8 bits, so what is used where errors would add up is split into a high and a low bf16 part ("pair"): S and E as operands,
// T, A and M among themselves, b', k', U and the triangles of the gradients. Measured effect: tests/test_cuda_wkv7.py.
#include "port.cuh"

#if !defined(__HIPCC__)

namespace {

using namespace port;

constexpr int N = 64;        // head size
constexpr int kTokens = 16;  // of a chunk
constexpr int kChunks = 3;  // of a segment: as many as leave room for two blocks in sm_90's shared memory, and for one in sm_86's
constexpr int kSegment = kChunks * kTokens;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTile = kTokens * N;          // elements of a 16 x 64 tile
constexpr int kSmall = kTokens * kTokens;   // elements of a 16 x 16 tile
constexpr int kLaneState = 32;              // elements of S that a lane owns
constexpr int kSlotBytes = kThreads * (kLaneState * 2 + 4);  // a kept state: fp16 and a scale per lane
constexpr float kDecayScale = -0.6065306597126334f;          // -exp(-0.5)
constexpr float kLog2E = 1.4426950408889634f;

struct Forward {
  const bf16 *r, *w, *k, *v, *a, *b;  // [tokens, H, 64]
  const float* state;                 // [documents, H, 64, 64] or null: zeros
  const int32_t* cu_seqlens;          // [documents + 1] or null: documents of tokens_each tokens
  bf16* y;
  float* final_state;
  unsigned char* saved_state;         // [segments, H, kSlotBytes] or null
  int64_t tokens_each;
  int heads;
};

struct Backward {
  const bf16 *dy, *r, *w, *k, *v, *a, *b;
  const float* dfinal_state;
  const unsigned char* saved_state;
  const int32_t* cu_seqlens;
  bf16 *dr, *dw, *dk, *dv, *da, *db;
  float* dstate;
  int64_t tokens_each;
  int heads;
};

#if PORT_TENSOR_CORES

// --- Tiles in shared memory: rows of 128 (or 32) bytes whose pieces of 16 bytes are permuted so that no access below meets a bank twice -----

DEVICE int at(int row, int column) { return row * N + (((column / 8) ^ (row % 8)) * 8) + column % 8; }
DEVICE int at_small(int row, int column) { return row * kTokens + (((column / 8) ^ ((row / 4) % 2)) * 8) + column % 8; }

// --- Fragments: 16 x 16 operands (4 registers) and 16 x 16 accumulators (two 16 x 8 halves) ------------------------------------------------

using Operand = uint32_t[4];
using Sums = float[2][4];

// Addresses are offset ^ column + row * 64: the permutation of pieces is an exclusive or, and rows come in multiples of 8.
struct Lane {
  int lane, warp, g, q;              // g, q: row and column pair in a fragment
  int plain, crossed;                // what this lane addresses of a 16 x 16 matrix in a tile, pieces in the order of rows, or of columns
  int small_plain, small_crossed;    // the same in a small tile
  int own;                           // its elements of an accumulator
  DEVICE Lane() {
    lane = int(threadIdx.x) % kWarpSize;
    warp = int(threadIdx.x) / kWarpSize;
    g = lane / 4;
    q = lane % 4;
    plain = at(lane % 16, lane / 16 * 8);
    crossed = at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
    small_plain = at_small(lane % 16, lane / 16 * 8);
    small_crossed = at_small(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
    own = at(g, 2 * q);
  }
  // Keeps the compiler from working out every address of a loop before the loop, for which there are not enough registers.
  DEVICE void forget() { opaque(plain), opaque(crossed), opaque(small_plain), opaque(small_crossed), opaque(own); }
};

// Left operand: X[row.., column..], or the transpose of that part of X. Right operand: the part itself (rows are summed over), or its transpose.
DEVICE void left(Operand& to, const bf16* x, int row, int column, const Lane& l) { load_matrices(to, x + (l.plain ^ column) + row * N); }
DEVICE void left_transposed(Operand& to, const bf16* x, int row, int column, const Lane& l) {
  load_matrices_transposed(to, x + (l.crossed ^ column) + row * N);
}
DEVICE void right(Operand& to, const bf16* x, int row, int column, const Lane& l) { load_matrices_transposed(to, x + (l.plain ^ column) + row * N); }
DEVICE void right_transposed(Operand& to, const bf16* x, int row, int column, const Lane& l) {
  load_matrices(to, x + (l.crossed ^ column) + row * N);
}
DEVICE void left_small(Operand& to, const bf16* x, const Lane& l) { load_matrices(to, x + l.small_plain); }
DEVICE void left_small_transposed(Operand& to, const bf16* x, const Lane& l) { load_matrices_transposed(to, x + l.small_crossed); }
DEVICE void right_small(Operand& to, const bf16* x, const Lane& l) { load_matrices_transposed(to, x + l.small_plain); }
DEVICE void right_small_transposed(Operand& to, const bf16* x, const Lane& l) { load_matrices(to, x + l.small_crossed); }

DEVICE void clear(Sums& x) {
#pragma unroll
  for (int i = 0; i < 8; i++) x[i / 4][i % 4] = 0.0f;
}

DEVICE void multiply(Sums& to, const Operand& a, const Operand& b) {
  matrix_product(to[0], a, b[0], b[1]);
  matrix_product(to[1], a, b[2], b[3]);
}
// The right operand here is the transpose of a matrix that is held as a left operand: the same registers in another order.
DEVICE void multiply_by_transposed(Sums& to, const Operand& a, const Operand& b) {
  matrix_product(to[0], a, b[0], b[2]);
  matrix_product(to[1], a, b[1], b[3]);
}

// Two neighbouring accumulators as a left operand: rounded, and what rounding left over.
DEVICE void high_part(Operand& to, const float (&x0)[4], const float (&x1)[4]) {
  to[0] = pack_bf16(x0[0], x0[1]), to[1] = pack_bf16(x0[2], x0[3]), to[2] = pack_bf16(x1[0], x1[1]), to[3] = pack_bf16(x1[2], x1[3]);
}
DEVICE void low_part(Operand& to, const Operand& high, const float (&x0)[4], const float (&x1)[4]) {
  const float x[8] = {x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3]};
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = pack_bf16(x[2 * i] - low_bf16(high[i]), x[2 * i + 1] - high_bf16(high[i]));
}
DEVICE void split(Operand& high, Operand& low, const Sums& x) {
  high_part(high, x[0], x[1]);
  low_part(low, high, x[0], x[1]);
}

// A left operand, or rounded accumulators, to columns column .. column+15 of a tile.
DEVICE void store(bf16* x, const Operand& from, int row, int column, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++) store4(x + (l.own ^ (column + 8 * (i / 2))) + (row + 8 * (i % 2)) * N, from[i]);
}
DEVICE void store_small(bf16* x, const Operand& from, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++) store4(x + at_small(l.g + 8 * (i % 2), 8 * (i / 2) + 2 * l.q), from[i]);
}
DEVICE void store_transposed(bf16* x, const Operand& from, int column, const Lane& l) {
  const int own[2] = {at(2 * l.q, l.g), at(2 * l.q + 1, l.g)};
#pragma unroll
  for (int i = 0; i < 8; i++) x[(own[i % 2] ^ (column + 8 * (i / 2 % 2))) + 8 * (i / 4) * N] = bf16{uint16_t(from[i / 2] >> (16 * (i % 2)))};
}

// Keeps element (row, column) where row >= column (or >, when strict).
DEVICE void lower_triangle(Sums& x, bool strict, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int row = l.g + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * l.q + i % 2;
    if (strict ? row <= column : row < column) x[i / 4][i % 4] = 0.0f;
  }
}
DEVICE void upper_triangle_strict(Sums& x, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int row = l.g + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * l.q + i % 2;
    if (row >= column) x[i / 4][i % 4] = 0.0f;
  }
}

// 16 x 16 accumulators as bf16 to rows of global memory (`x` points at the token and channel of element 0, 0). Neighbouring lanes
// swap halves, so that each writes 8 bytes and four of them a sector of 32.
DEVICE void store_rows(bf16* x, int row_stride, const Sums& from, int rows, const Lane& l) {
  const bool odd = l.q % 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t first = pack_bf16(from[0][2 * half], from[0][2 * half + 1]), second = pack_bf16(from[1][2 * half], from[1][2 * half + 1]);
    const uint32_t got = float_to_bits(shuffle_xor(bits_to_float(odd ? first : second), 1));
    const int row = l.g + 8 * half;
    if (row < rows) store8(x + row * row_stride + (odd ? 8 + 2 * (l.q - 1) : 2 * l.q), odd ? got : first, odd ? second : got);
  }
}

// --- The walk over a document ---------------------------------------------------------------------------------------------------

struct Document {
  int begin, end, first_segment;  // tokens of all documents together are fewer than 2^31
  int number, head;
  DEVICE Document(const int32_t* cu_seqlens, int64_t tokens_each, int heads) {
    number = int(blockIdx.x) / heads;
    head = int(blockIdx.x) % heads;
    begin = cu_seqlens ? cu_seqlens[number] : int(number * tokens_each);
    end = cu_seqlens ? cu_seqlens[number + 1] : int(begin + tokens_each);
    first_segment = begin / kSegment + number;  // room for every earlier document's partial last segment
  }
  DEVICE int64_t matrix(int heads) const { return (int64_t(number) * heads + head) * N * N; }  // of its state
};

// Starts copying one chunk's rows [rows, 64] of x into a tile; rows that don't exist become zeros. By one warp.
DEVICE void fetch(bf16* tile, const bf16* x, int row_stride, int rows, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = i * 4 + l.lane / 8, column = l.lane % 8 * 8;
    if (row < rows)
      copy16_async(tile + at(row, column), x + row * row_stride + column);
    else
      store16(tile + at(row, column), {0, 0, 0, 0});
  }
}

using State = float[8][4];  // a warp's 16 value rows of S or D: accumulators of 16 x 8 for 8 groups of key columns

DEVICE void load_state(State& s, const float* from, const Lane& l) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* pair = from + (16 * l.warp + l.g + 8 * half) * N + 8 * n + 2 * l.q;
      s[n][2 * half] = from ? pair[0] : 0.0f;
      s[n][2 * half + 1] = from ? pair[1] : 0.0f;
    }
}
DEVICE void store_state(float* to, const State& s, const Lane& l) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      store8(to + (16 * l.warp + l.g + 8 * half) * N + 8 * n + 2 * l.q, float_to_bits(s[n][2 * half]), float_to_bits(s[n][2 * half + 1]));
}

// A kept state: each lane's 32 numbers as fp16, scaled by a power of two so that the largest is in [2^14, 2^15).
DEVICE void keep_state(unsigned char* slot, const State& s) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneState; i++) largest = fmaxf(largest, fabsf(s[i / 4][i % 4]));
  const uint32_t exponent = float_to_bits(largest) >> 23 > 15 ? float_to_bits(largest) >> 23 : 15;
  const float scale = bits_to_float((268 - exponent) << 23);
  reinterpret_cast<float*>(slot + kThreads * kLaneState * 2)[threadIdx.x] = bits_to_float((exponent - 14) << 23);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = 8 * i + 2 * j;
      words[j] = uint32_t(from_float<fp16>(s[at / 4][at % 4] * scale).bits) | uint32_t(from_float<fp16>(s[at / 4][at % 4 + 1] * scale).bits) << 16;
    }
    store16(slot + (i * kThreads + threadIdx.x) * 16, {words[0], words[1], words[2], words[3]});
  }
}
DEVICE void recall_state(State& s, const unsigned char* slot) {
  const float scale = reinterpret_cast<const float*>(slot + kThreads * kLaneState * 2)[threadIdx.x];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 bits = load16(slot + (i * kThreads + threadIdx.x) * 16);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int j = 0; j < 8; j++) s[(8 * i + j) / 4][j % 4] = to_float(fp16{uint16_t(words[j / 2] >> (16 * (j % 2)))}) * scale;
  }
}

DEVICE void scale_columns(State& s, const float* factors, const Lane& l) {
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const float first = factors[8 * n + 2 * l.q], second = factors[8 * n + 2 * l.q + 1];
    s[n][0] *= first, s[n][1] *= second, s[n][2] *= first, s[n][3] *= second;
  }
}

// --- Prepare: everything about a chunk that doesn't need the state -----------------------------------------------------------------

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

// log2 of the products of decays up to t (inclusive) and t - 1 (before), for tokens t and 16 channels: sums over time are a product with a triangle of ones.
DEVICE void cumulate_decay(Sums& inclusive, Sums& before, const bf16* raw_w, int column, int rows, const Lane& l) {
  Operand ones, ones_strict, w, high, low;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = l.g + 8 * (i % 2), first = 8 * (i / 2) + 2 * l.q;
    ones[i] = (row >= first ? 0x3f80u : 0u) | (row >= first + 1 ? 0x3f800000u : 0u);
    ones_strict[i] = (row > first ? 0x3f80u : 0u) | (row > first + 1 ? 0x3f800000u : 0u);
  }
  right(w, raw_w, 0, column, l);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = 2 * l.q + 8 * (i % 2);
    const float first = token < rows ? kDecayScale * kLog2E * sigmoid(low_bf16(w[i])) : 0.0f;
    const float second = token + 1 < rows ? kDecayScale * kLog2E * sigmoid(high_bf16(w[i])) : 0.0f;
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

// --- Recur: by each warp on its 16 value rows ------------------------------------------------------------------------------------------

// S <- (S + (S W^T) b' + V^T K) diag(P_16), given S as operands.
DEVICE void advance(State& s, const Operand (&high)[4], const Operand (&low)[4], const Chunk& c, const bf16* big_k, const Lane& l) {
  Sums sums;
  Operand x, u, v;
  clear(sums);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    right_transposed(x, c.w, 0, 16 * n, l);
    multiply(sums, low[n], x);
    multiply(sums, high[n], x);
  }
  high_part(u, sums[0], sums[1]);
  left_transposed(v, c.v, 0, 16 * l.warp, l);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    right(x, c.b, 0, 16 * n, l);
    matrix_product(s[2 * n], u, x[0], x[1]), matrix_product(s[2 * n + 1], u, x[2], x[3]);
    right(x, big_k, 0, 16 * n, l);
    matrix_product(s[2 * n], v, x[0], x[1]), matrix_product(s[2 * n + 1], v, x[2], x[3]);
  }
  scale_columns(s, c.decay, l);
}

DEVICE void split_state(Operand (&high)[4], Operand (&low)[4], const State& s) {
#pragma unroll
  for (int n = 0; n < 4; n++) {
    high_part(high[n], s[2 * n], s[2 * n + 1]);
    low_part(low[n], high[n], s[2 * n], s[2 * n + 1]);
  }
}

#endif  // PORT_TENSOR_CORES

// --- Forward -----------------------------------------------------------------------------------------------------------------------

struct ForwardMemory {  // of a block, in elements of bf16
  static constexpr int chunk = 6 * kTile + kSmall + 2 * N;            // w a b k r v, q, decay
  static constexpr int scratch = 2 * kSmall + 2 * kSmall + kTile;     // a_ab (fp32), t, the low part of k'
  static constexpr int elements = 2 * kChunks * chunk + kChunks * scratch;
};

__global__ void __launch_bounds__(kThreads, 2) wkv7_chunked_forward(Forward p) {
#if PORT_TENSOR_CORES
  using Memory = ForwardMemory;
  SHARED_MEMORY(shared);
  bf16* const memory = reinterpret_cast<bf16*>(shared);
  Lane l;
  const Document at(p.cu_seqlens, p.tokens_each, p.heads);
  const int row_stride = p.heads * N;

  // Two buffers of chunks: a segment's inputs arrive while the one before is computed.
  const auto chunk = [&](int segment, int number) {
    bf16* const base = memory + ((segment % 2) * kChunks + number) * Memory::chunk;
    Chunk c{};
    c.w = base, c.a = base + kTile, c.b = base + 2 * kTile, c.k = base + 3 * kTile, c.r = base + 4 * kTile, c.v = base + 5 * kTile;
    c.q = base + 6 * kTile;
    c.decay = reinterpret_cast<float*>(base + 6 * kTile + kSmall);
    return c;
  };
  const auto fetch_chunk = [&](int segment) {  // the chunk that this warp prepares
    const int first = at.begin + segment * kSegment + l.warp * kTokens;
    if (l.warp < kChunks && first < at.end) {
      const Chunk c = chunk(segment, l.warp);
      const int rows = at.end - first < kTokens ? at.end - first : kTokens;
      const int64_t from = int64_t(first) * row_stride + at.head * N;
      fetch(c.w, p.w + from, row_stride, rows, l), fetch(c.a, p.a + from, row_stride, rows, l), fetch(c.b, p.b + from, row_stride, rows, l);
      fetch(c.k, p.k + from, row_stride, rows, l), fetch(c.r, p.r + from, row_stride, rows, l), fetch(c.v, p.v + from, row_stride, rows, l);
    }
    copy_async_commit();
  };

  State s;
  load_state(s, p.state ? p.state + at.matrix(p.heads) : nullptr, l);
  const int segments = (at.end - at.begin + kSegment - 1) / kSegment;
  fetch_chunk(0);
  for (int segment = 0; segment < segments; segment++) {
    const int first = at.begin + segment * kSegment;
    const int count = at.end - first < kSegment ? at.end - first : kSegment;
    copy_async_wait<0>();
    sync_warp();
    if (l.warp < kChunks && l.warp * kTokens < count) {
      bf16* const base = memory + 2 * kChunks * Memory::chunk + l.warp * Memory::scratch;
      const Scratch scratch{reinterpret_cast<float*>(base), base + 2 * kSmall, base + 3 * kSmall};
      Chunk c = chunk(segment, l.warp);
      // The low part of b' is needed until K is there, that of k' too.
      c.b_low = base + 4 * kSmall;
      c.k_low = c.w;
      prepare<false>(c, scratch, count - l.warp * kTokens, l);
    }
    sync_block();
    fetch_chunk(segment + 1);  // everyone has left that buffer
    if (p.saved_state) keep_state(p.saved_state + (int64_t(at.first_segment + segment) * p.heads + at.head) * kSlotBytes, s);
#pragma unroll 1
    for (int number = 0; number * kTokens < count; number++) {
      l.forget();
      const Chunk c = chunk(segment, number);
      Operand high[4], low[4], x, v;
      Sums y;
      split_state(high, low, s);
      clear(y);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        left(x, c.r, 0, 16 * n, l);
        multiply_by_transposed(y, x, low[n]);
        multiply_by_transposed(y, x, high[n]);
      }
      left_small(x, c.q, l);
      right(v, c.v, 0, 16 * l.warp, l);
      multiply(y, x, v);
      store_rows(p.y + int64_t(first + number * kTokens) * row_stride + at.head * N + 16 * l.warp, row_stride, y, count - number * kTokens, l);
      advance(s, high, low, c, c.k, l);
    }
  }
  copy_async_wait<0>();
  store_state(p.final_state + at.matrix(p.heads), s, l);
#endif
}

// --- Backward ----------------------------------------------------------------------------------------------------------------------

#if PORT_TENSOR_CORES

// colsum(E * S) over a warp's 16 rows, S as left operands. At each step a lane gives away half of the columns that it still has;
// afterwards sums[0] and sums[1] are those of columns `column` and `column` + 1, which is returned.
template <int mask = 16, int held = 16>
DEVICE int sum_columns(float (&sums)[16], const Lane& l, int first = 0) {
  if constexpr (mask >= 4) {
    constexpr int half = held / 2;
    const bool upper = l.lane & mask;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const float give = upper ? sums[i] : sums[i + half];
      sums[i] = (upper ? sums[i + half] : sums[i]) + shuffle_xor(give, mask);
    }
    return sum_columns<mask / 2, half>(sums, l, first + (upper ? half : 0));
  } else {
    return 8 * (first / 2) + 2 * l.q;
  }
}
DEVICE int column_products(float (&sums)[16], const State& d, const Operand (&s)[4], const Lane& l) {
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i] = 0.0f;
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sums[2 * n] += d[n][2 * half] * low_bf16(s[n / 2][n % 2 * 2 + half]);
      sums[2 * n + 1] += d[n][2 * half + 1] * high_bf16(s[n / 2][n % 2 * 2 + half]);
    }
  return sum_columns<>(sums, l);
}

// Sums over this and all earlier (or later) tokens of the chunk, for each of a lane's channels.
template <bool kLater>
DEVICE void running_sums(Sums& x, const Lane& l) {
  constexpr int towards = kLater ? 1 : -1;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float near = x[i][kLater ? 2 + e : e], far = x[i][kLater ? e : 2 + e];  // the half where sums begin, rows g or g + 8
#pragma unroll
      for (int step = 1; step < 8; step *= 2) {
        const bool there = kLater ? l.g + step < 8 : l.g >= step;
        const int source = there ? l.lane + 4 * step * towards : l.lane;
        const float more_near = shuffle(near, source), more_far = shuffle(far, source);
        near += there ? more_near : 0.0f;
        far += there ? more_far : 0.0f;
      }
      far += shuffle(near, kLater ? l.q : 28 + l.q);
      x[i][kLater ? 2 + e : e] = near;
      x[i][kLater ? e : 2 + e] = far;
    }
}

// One of several sets of registers, by a number that is not a constant: selects, so that nothing moves to memory.
template <int kCount, int kSets>
DEVICE void pick(Operand& to, const Operand (&from)[kCount][kSets], int number, int set) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[i] = from[0][set][i];
#pragma unroll
    for (int j = 1; j < kCount; j++) to[i] = j == number ? from[j][set][i] : to[i];
  }
}

// What the warps of a block hand each other within a chunk.
struct Exchange {
  bf16 *s, *e, *e_low;       // [64, 64]: S at the chunk's start and E
  bf16 *z, *u_high, *u_low;  // [16, 64]
  bf16* low;                 // twice [16, 64]: low parts of b' and k'; each warp's columns are its own
  bf16 *triangles;           // four times [16, 16] and its low part: Z U^T, Z V^T, dY U^T, dY V^T
  float* z_shares;           // [4, 64]: colsum(E * S) of each warp
};

// da' += (Z X^T) y and dr' += (dY X^T) y, where y is b' (X = U) or k' (X = V); triangles and y are pairs.
DEVICE void collect_rows(Sums& da, Sums& dr, const bf16* triangles, const bf16* y, const bf16* y_low, int column, const Lane& l) {
  Operand high, low, m;
  right(low, y_low, 0, column, l), right(high, y, 0, column, l);
#pragma unroll
  for (int part = 1; part >= 0; part--) {
    left_small(m, triangles + part * kSmall, l);
    if (part == 0) multiply(da, m, low);
    multiply(da, m, high);
    left_small(m, triangles + (4 + part) * kSmall, l);
    if (part == 0) multiply(dr, m, low);
    multiply(dr, m, high);
  }
}
// db' += (Y U^T)^T y and dk' += (Y V^T)^T y, where y is a' (Y = Z) or r' (Y = dY).
DEVICE void collect_columns(Sums& db, Sums& dk, const bf16* triangles, const bf16* y, int column, const Lane& l) {
  Operand high, m;
  right(high, y, 0, column, l);
#pragma unroll
  for (int part = 1; part >= 0; part--) {
    left_small_transposed(m, triangles + part * kSmall, l);
    multiply(db, m, high);
    left_small_transposed(m, triangles + (2 + part) * kSmall, l);
    multiply(dk, m, high);
  }
}

#endif

struct BackwardMemory {  // of a block, in elements of bf16
  static constexpr int chunk = 9 * kTile + 3 * kSmall + 2 * N;
  static constexpr int exchange = 3 * N * N + 5 * kTile + 8 * kSmall + 2 * kWarps * N;
  static constexpr int elements = kChunks * chunk + exchange;
};

__global__ void __launch_bounds__(kThreads, 2) wkv7_chunked_backward(Backward p) {
#if PORT_TENSOR_CORES
  using Memory = BackwardMemory;
  SHARED_MEMORY(shared);
  bf16* const memory = reinterpret_cast<bf16*>(shared);
  Lane l;
  const Document at(p.cu_seqlens, p.tokens_each, p.heads);
  const int row_stride = p.heads * N;
  const int mine = 16 * l.warp;  // first of this warp's value rows, and of its key columns

  Exchange x;
  {
    bf16* const base = memory + kChunks * Memory::chunk;
    x.s = base, x.e = base + N * N, x.e_low = base + 2 * N * N;
    x.z = base + 3 * N * N, x.u_high = x.z + kTile, x.u_low = x.u_high + kTile;
    x.triangles = x.u_low + kTile;
    x.low = x.triangles + 8 * kSmall;
    x.z_shares = reinterpret_cast<float*>(x.low + 2 * kTile);
  }
  const auto chunk = [&](int number) {
    bf16* const base = memory + number * Memory::chunk;
    Chunk c{};
    c.w = base, c.a = base + kTile, c.b = base + 2 * kTile, c.k = base + 3 * kTile, c.r = base + 4 * kTile, c.v = base + 5 * kTile;
    c.dy = base + 6 * kTile, c.big_k = base + 7 * kTile, c.bz = base + 8 * kTile;
    c.q = base + 9 * kTile, c.rbt = c.q + kSmall, c.m_transposed = c.rbt + kSmall;
    c.decay = reinterpret_cast<float*>(c.m_transposed + kSmall);
    c.b_low = x.s + number * kTile, c.k_low = x.e + number * kTile;  // needed by prepare only
    return c;
  };
  const auto fetch_chunk = [&](int segment, int number) {  // by the warp that prepares it
    const int first = at.begin + segment * kSegment + number * kTokens;
    if (segment >= 0 && l.warp == number && first < at.end) {
      const Chunk c = chunk(number);
      const int rows = at.end - first < kTokens ? at.end - first : kTokens;
      const int64_t from = int64_t(first) * row_stride + at.head * N;
      fetch(c.w, p.w + from, row_stride, rows, l), fetch(c.a, p.a + from, row_stride, rows, l), fetch(c.b, p.b + from, row_stride, rows, l);
      fetch(c.k, p.k + from, row_stride, rows, l), fetch(c.r, p.r + from, row_stride, rows, l), fetch(c.v, p.v + from, row_stride, rows, l);
      fetch(c.dy, p.dy + from, row_stride, rows, l);
    }
    copy_async_commit();
  };

  State d;
  load_state(d, p.dfinal_state ? p.dfinal_state + at.matrix(p.heads) : nullptr, l);
  const int segments = (at.end - at.begin + kSegment - 1) / kSegment;
#pragma unroll 1
  for (int number = 0; number < kChunks; number++) fetch_chunk(segments - 1, number);
#pragma unroll 1
  for (int segment = segments - 1; segment >= 0; segment--) {
    const int first = at.begin + segment * kSegment;
    const int count = at.end - first < kSegment ? at.end - first : kSegment;
    const int chunks = (count + kTokens - 1) / kTokens;
    copy_async_wait<0>();
    sync_warp();
    if (l.warp < chunks) {
      bf16* const base = x.z + l.warp * 4 * kSmall;
      const Scratch scratch{reinterpret_cast<float*>(base), base + 2 * kSmall, base + 3 * kSmall};
      prepare<true>(chunk(l.warp), scratch, count - l.warp * kTokens, l);
    }
    sync_block();

    l.forget();
    // S at each chunk's start, rounded, in registers.
    Operand states[kChunks][4];
    {
      State s;
      recall_state(s, p.saved_state + (int64_t(at.first_segment + segment) * p.heads + at.head) * kSlotBytes);
#pragma unroll
      for (int number = 0; number < kChunks; number++) {
        if (number < chunks) {
          const Chunk c = chunk(number);
          Operand low[4];
          split_state(states[number], low, s);
          if (number + 1 < chunks) advance(s, states[number], low, c, c.big_k, l);
        }
      }
    }

#pragma unroll 1
    for (int number = chunks - 1; number >= 0; number--) {
      l.forget();
      const Chunk c = chunk(number);
      const int rows = count - number * kTokens;
      const int64_t out = int64_t(first + number * kTokens) * row_stride + at.head * N + mine;
      // Recur. Nothing shared is written before the barrier: other warps still collect the chunk after this one.
      Operand e_high[4], e_low[4], z, u, u_low;
      scale_columns(d, c.decay, l);  // E
      float z_share[16];
      int z_column;
      {
        Operand start[4];
#pragma unroll
        for (int n = 0; n < 4; n++) pick(start[n], states, number, n);
        z_column = column_products(z_share, d, start, l);
      }
      {
        Operand m, t;
        Sums sums;
        split_state(e_high, e_low, d);
        clear(sums);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          right_transposed(m, c.bz, 0, 16 * n, l);
          multiply(sums, e_low[n], m), multiply(sums, e_high[n], m);
        }
        left_transposed(t, c.dy, 0, mine, l);
        right_small(m, c.rbt, l);
        multiply(sums, t, m);
        high_part(z, sums[0], sums[1]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          right(m, c.a, 0, 16 * n, l);
          matrix_product(d[2 * n], z, m[0], m[1]), matrix_product(d[2 * n + 1], z, m[2], m[3]);
          right(m, c.r, 0, 16 * n, l);
          matrix_product(d[2 * n], t, m[0], m[1]), matrix_product(d[2 * n + 1], t, m[2], m[3]);
        }
        clear(sums);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          left(m, c.big_k, 0, 16 * n, l);
          multiply_by_transposed(sums, m, e_low[n]), multiply_by_transposed(sums, m, e_high[n]);
        }
        left_small_transposed(t, c.q, l);
        right(m, c.dy, 0, mine, l);
        multiply(sums, t, m);
        store_rows(p.dv + out, row_stride, sums, rows, l);
        clear(sums);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          pick(t, states, number, n);
          right_transposed(m, c.w, 0, 16 * n, l);
          multiply(sums, t, m);
        }
        left_transposed(t, c.v, 0, mine, l);
        right_small(m, c.m_transposed, l);
        multiply(sums, t, m);
        split(u, u_low, sums);
      }
      sync_block();
      l.forget();
      if (number + 1 < chunks) fetch_chunk(segment - 1, number + 1);  // everyone is done with that one
      store8(x.z_shares + l.warp * N + z_column, float_to_bits(z_share[0]), float_to_bits(z_share[1]));
#pragma unroll
      for (int n = 0; n < 4; n++) {
        Operand start;
        pick(start, states, number, n);
        store(x.s, start, mine, 16 * n, l);
        store(x.e, e_high[n], mine, 16 * n, l);
        store(x.e_low, e_low[n], mine, 16 * n, l);
      }
      store_transposed(x.z, z, mine, l);
      store_transposed(x.u_high, u, mine, l);
      store_transposed(x.u_low, u_low, mine, l);
      sync_block();

      {  // Z U^T, Z V^T, dY U^T, dY V^T: one each
        const bf16 *const by = l.warp < 2 ? x.z : c.dy, *const with = l.warp % 2 ? c.v : x.u_high;
        Sums sums;
        Operand m, t;
        clear(sums);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          left(m, by, 0, 16 * n, l);
          right_transposed(t, with, 0, 16 * n, l);
          multiply(sums, m, t);
          if (l.warp % 2 == 0) {
            right_transposed(t, x.u_low, 0, 16 * n, l);
            multiply(sums, m, t);
          }
        }
        lower_triangle(sums, l.warp < 2, l);
        split(m, t, sums);
        store_small(x.triangles + 2 * l.warp * kSmall, m, l);
        store_small(x.triangles + (2 * l.warp + 1) * kSmall, t, l);
      }
      sync_block();

      // Collect, for key columns mine .. mine + 15.
      l.forget();
      Sums log_decay, log_p;  // of a token, and summed up to it
      float slope[8];         // of log_decay in w, in units of the natural logarithm
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = l.g + 8 * (i % 2);
        const uint32_t raw = row < rows ? load4(p.w + out + row * row_stride + 8 * (i / 2) + 2 * l.q) : 0;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float w = e ? high_bf16(raw) : low_bf16(raw), gate = sigmoid(w);
          log_decay[i / 2][i % 2 * 2 + e] = row < rows ? kDecayScale * kLog2E * gate : 0.0f;
          log_p[i / 2][i % 2 * 2 + e] = log_decay[i / 2][i % 2 * 2 + e];
          slope[2 * i + e] = kDecayScale * gate * sigmoid(-w);
        }
      }
      running_sums<false>(log_p, l);

      // The gradient of log(decay) is a difference of large sums. It is good when its products are taken with what those sums were taken with:
      // the rounded a', r' and the pairs b', k', not the inputs. `later` is summed over this and later tokens, `earlier` over earlier ones.
      Sums later, earlier, x0, x1;
      Operand row0, row1;
      const auto value = [](const Operand& packed, int i) { return i % 2 ? high_bf16(packed[i / 2]) : low_bf16(packed[i / 2]); };
      {
        // The low parts of b' and k' again, from the inputs (still in the L2 cache): there are no registers to keep them.
        Operand b_low, k_low;
        left(row0, c.b, 0, mine, l), left(row1, c.k, 0, mine, l);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = l.g + 8 * (i % 2);
          const int64_t from = out + row * row_stride + 8 * (i / 2) + 2 * l.q;
          const uint32_t b = row < rows ? load4(p.b + from) : 0, k = row < rows ? load4(p.k + from) : 0;
          const float first = fast_exp2(-log_p[i / 2][i % 2 * 2]), second = fast_exp2(-log_p[i / 2][i % 2 * 2 + 1]);
          b_low[i] = pack_bf16(low_bf16(b) * first - low_bf16(row0[i]), high_bf16(b) * second - high_bf16(row0[i]));
          k_low[i] = pack_bf16(low_bf16(k) * first - low_bf16(row1[i]), high_bf16(k) * second - high_bf16(row1[i]));
        }
        store(x.low, b_low, 0, mine, l), store(x.low + kTile, k_low, 0, mine, l);
        clear(x0), clear(x1);
#pragma unroll
        for (int n = 0; n < 4; n++) {  // U E and V E
          Operand m, t, v;
          left(m, x.u_high, 0, 16 * n, l), left(v, c.v, 0, 16 * n, l);
          right(t, x.e_low, 16 * n, mine, l);
          multiply(x0, m, t), multiply(x1, v, t);
          right(t, x.e, 16 * n, mine, l);
          multiply(x0, m, t), multiply(x1, v, t);
          left(m, x.u_low, 0, 16 * n, l);
          multiply(x0, m, t);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
          earlier[i / 4][i % 4] = (value(row0, i) + value(b_low, i)) * x0[i / 4][i % 4] + (value(row1, i) + value(k_low, i)) * x1[i / 4][i % 4];
        collect_columns(x0, x1, x.triangles, c.a, mine, l);
        collect_columns(x0, x1, x.triangles + 4 * kSmall, c.r, mine, l);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          later[i / 4][i % 4] = earlier[i / 4][i % 4] - (value(row0, i) + value(b_low, i)) * x0[i / 4][i % 4] -
                                (value(row1, i) + value(k_low, i)) * x1[i / 4][i % 4];
          const float inverse = fast_exp2(-log_p[i / 4][i % 4]);
          x0[i / 4][i % 4] *= inverse, x1[i / 4][i % 4] *= inverse;
        }
        store_rows(p.db + out, row_stride, x0, rows, l), store_rows(p.dk + out, row_stride, x1, rows, l);
      }
      clear(x0), clear(x1);
#pragma unroll
      for (int n = 0; n < 4; n++) {  // Z S and dY S
        Operand m, t;
        right(t, x.s, 16 * n, mine, l);
        left(m, x.z, 0, 16 * n, l);
        multiply(x0, m, t);
        left(m, c.dy, 0, 16 * n, l);
        multiply(x1, m, t);
      }
      sync_warp();  // x.low has been written
      collect_rows(x0, x1, x.triangles, c.b, x.low, mine, l);
      collect_rows(x0, x1, x.triangles + 2 * kSmall, c.k, x.low + kTile, mine, l);
      left(row0, c.a, 0, mine, l), left(row1, c.r, 0, mine, l);
      Sums dw;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float of_a = value(row0, i) * x0[i / 4][i % 4];
        dw[i / 4][i % 4] = -of_a - earlier[i / 4][i % 4];  // what the two sums below have of this token itself
        later[i / 4][i % 4] += of_a + value(row1, i) * x1[i / 4][i % 4];
        x0[i / 4][i % 4] *= fast_exp2(log_p[i / 4][i % 4] - log_decay[i / 4][i % 4]);
        x1[i / 4][i % 4] *= fast_exp2(log_p[i / 4][i % 4]);
      }
      store_rows(p.da + out, row_stride, x0, rows, l), store_rows(p.dr + out, row_stride, x1, rows, l);
      running_sums<true>(later, l);
      running_sums<false>(earlier, l);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float z = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; warp++) z += x.z_shares[warp * N + mine + 8 * (i / 4) + 2 * l.q + i % 2];
        dw[i / 4][i % 4] = (dw[i / 4][i % 4] + z + later[i / 4][i % 4] + earlier[i / 4][i % 4]) * slope[i];
      }
      store_rows(p.dw + out, row_stride, dw, rows, l);
    }
    sync_block();
    fetch_chunk(segment - 1, 0);
    if (chunks < kChunks)  // the last segment was short: nobody has fetched these for the one before it
#pragma unroll 1
      for (int number = chunks; number < kChunks; number++) fetch_chunk(segment - 1, number);
  }
  copy_async_wait<0>();
  if (p.dstate) store_state(p.dstate + at.matrix(p.heads), d, l);
#endif
}

// --- Entry points ---------------------------------------------------------------------------------------------------------

constexpr size_t kForwardBytes = ForwardMemory::elements * sizeof(bf16);
constexpr size_t kBackwardBytes = BackwardMemory::elements * sizeof(bf16);
static_assert(kForwardBytes <= 99 * 1024 && kBackwardBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 have 99 KB");

constexpr int kNoSuchKernel = -1;

}  // namespace

extern "C" {

// Bytes that forward keeps for backward, for `tokens` tokens in all.
int64_t wkv7_chunked_saved_state_bytes(int, int64_t documents, int64_t tokens, int64_t heads) {
  return (tokens / kSegment + documents) * heads * kSlotBytes;
}
int64_t wkv7_chunked_saved_sa_bytes(int, int64_t, int64_t, int64_t) { return 0; }

// As in wkv7_recurrent.cu; dtype must be 1 (bf16), head_size 64, and saved_sa is not used.
int wkv7_chunked_forward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* r, const void* w, const void* k,
                         const void* v, const void* a, const void* b, const float* state, const int32_t* cu_seqlens, void* y,
                         float* final_state, void* saved_state, void*, int64_t stream) {
  if (dtype != 1 || head_size != N) return kNoSuchKernel;
  const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  const Forward p{in(r), in(w), in(k), in(v), in(a), in(b), state, cu_seqlens, static_cast<bf16*>(y), final_state,
                  static_cast<unsigned char*>(saved_state), tokens_each, heads};
  return launch(wkv7_chunked_forward, unsigned(documents * heads), kThreads, kForwardBytes, stream, p);
}

int wkv7_chunked_backward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* dy, const float* dfinal_state,
                          const void* r, const void* w, const void* k, const void* v, const void* a, const void* b, const int32_t* cu_seqlens,
                          const void* saved_state, const void*, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* dstate,
                          int64_t stream) {
  if (dtype != 1 || head_size != N) return kNoSuchKernel;
  const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  const auto out = [](void* x) { return static_cast<bf16*>(x); };
  const Backward p{in(dy), in(r), in(w), in(k), in(v), in(a), in(b), dfinal_state, static_cast<const unsigned char*>(saved_state), cu_seqlens,
                   out(dr), out(dw), out(dk), out(dv), out(da), out(db), dstate, tokens_each, heads};
  return launch(wkv7_chunked_backward, unsigned(documents * heads), kThreads, kBackwardBytes, stream, p);
}
}

#endif  // !__HIPCC__
