// The chunked kernel's sizes, its tiles in shared memory, and what warps do with 16 x 16 matrices in registers.
#pragma once
#include "port.cuh"

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

#endif  // PORT_TENSOR_CORES

}  // namespace
