// A warp's 16 rows of the state in registers: to and from memory, kept in 16 bits for backward, and the step over a chunk.
#pragma once
#include "chunked_prepare.cuh"

namespace {

constexpr int kLaneState = 32;                               // elements of S that a lane owns
constexpr int kSlotBytes = kThreads * (kLaneState * 2 + 4);  // a kept state: fp16 and a scale per lane

#if PORT_TENSOR_CORES

using Document = DocumentOf<int>;  // tokens of all documents together are fewer than 2^31

// Starts copying one chunk's rows [rows, 64] of x into a tile; rows that don't exist become zeros. By one warp.
DEVICE void fetch(bf16* tile, const bf16* x, int row_stride, int rows, const Lane& l) {
  const int first = l.lane / 8, column = l.lane % 8 * 8;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = i * 4 + first;
    // A row that doesn't exist has an address too, of which nothing is read: that of the first row.
    copy16_async(tile + at(row, column), x + (row < rows ? row * row_stride : 0) + column, row < rows ? 16 : 0);
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
      words[j] = pack(from_float<fp16>(s[at / 4][at % 4] * scale), from_float<fp16>(s[at / 4][at % 4 + 1] * scale));
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

}  // namespace
