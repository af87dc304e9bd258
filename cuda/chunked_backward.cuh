// The chunked kernel backward. Formulas: wkv7_chunked.cu.
#pragma once
#include "chunked_state.cuh"

namespace {

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

// Sums over this and all later tokens of the chunk, for each of a lane's channels.
DEVICE void suffix_sums(Sums& x, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float late = x[i][2 + e], early = x[i][e];  // of tokens g + 8 and g
#pragma unroll
      for (int step = 1; step < 8; step *= 2) {
        const bool inside = l.g + step < 8;
        const int source = inside ? l.lane + 4 * step : l.lane;
        const float more_late = shuffle(late, source), more_early = shuffle(early, source);
        late += inside ? more_late : 0.0f;
        early += inside ? more_early : 0.0f;
      }
      x[i][e] = early + shuffle(late, l.q);
      x[i][2 + e] = late;
    }
}

// Sums over all tokens of the chunk, for each of a lane's 4 channels: 8 i + 2 q + e to to[2 i + e].
DEVICE void sum_tokens(float (&to)[4], const Sums& x) {
#pragma unroll
  for (int c = 0; c < 4; c++) {
    to[c] = x[c / 2][c % 2] + x[c / 2][2 + c % 2];
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) to[c] += shuffle_xor(to[c], mask);
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

// Turns of the loop over U E and V E that are unrolled: 4 would spill on sm_80, and 2 spill 8 bytes on sm_100 and sm_120.
constexpr int kTurns = PORT_TARGET >= 1000 ? 1 : 2;

#endif  // PORT_TENSOR_CORES

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
  const Document at(p.cu_seqlens, p.tokens_each, p.heads, kSegment);
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
  load_state(d, p.dfinal_state ? p.dfinal_state + at.matrix(p.heads, N) : nullptr, l);
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

    // The segment before this one needs its first chunk first, but that can be fetched only after everything else here, when its tiles are
    // free. So it is brought into the L2 cache by then: a row of 128 bytes by each thread.
    if (segment > 0 && int(threadIdx.x) < 7 * kTokens) {
      const int which = int(threadIdx.x) / kTokens;
      const int64_t row = int64_t(first - kSegment + int(threadIdx.x) % kTokens) * row_stride + at.head * N;
      const bf16* from = p.w;  // selects, since an array with a variable index would lie in memory
      from = which == 1 ? p.a : from, from = which == 2 ? p.b : from, from = which == 3 ? p.k : from;
      from = which == 4 ? p.r : from, from = which == 5 ? p.v : from, from = which == 6 ? p.dy : from;
      prefetch(from + row);
    }

    l.forget();
    // S at each chunk's start, rounded, in registers.
    Operand states[kChunks][4];
    {
      State s;
      recall_state(s, p.saved_state + (int64_t(at.first_slot + segment) * p.heads + at.head) * kSlotBytes);
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
      if (number + 1 < chunks) fetch_chunk(segment - 1, number + 1);  // after the barrier: no warp reads that chunk any more
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
      // Raw w is read again (from the L2 cache) where it is needed again: there are no registers to keep it.
      const auto raw_w = [&](int i) {
        const int row = l.g + 8 * (i % 2);
        return row < rows ? load4(p.w + out + row * row_stride + 8 * (i / 2) + 2 * l.q) : 0u;
      };
      Sums log_p;  // log2 of the decays' product up to a token: the sums that prepare had, with the same bits
      {
        Operand ones, high, low;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint32_t raw = raw_w(i);
          const bool exists = l.g + 8 * (i % 2) < rows;
          const float first = exists ? log2_decay(low_bf16(raw)) : 0.0f, second = exists ? log2_decay(high_bf16(raw)) : 0.0f;
          high[i] = pack_bf16(first, second);
          low[i] = pack_bf16(first - low_bf16(high[i]), second - high_bf16(high[i]));
        }
        store(x.low, high, 0, mine, l), store(x.low + kTile, low, 0, mine, l);
        sync_warp();
        right(high, x.low, 0, mine, l), right(low, x.low + kTile, 0, mine, l);
        triangle_of_ones(ones, false, l);
        clear(log_p);
        multiply(log_p, ones, low), multiply(log_p, ones, high);
        sync_warp();  // all have read x.low: it is written again below
      }

      // The gradient of log(decay) is a difference of large sums. It is good when its products are taken with what those sums were taken with:
      // the rounded a', r' and the pairs b', k', not the inputs. `later` is summed over this and later tokens, `of_values` over all.
      Sums later, x0, x1;
      float of_values[4];
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
#pragma unroll kTurns
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
          later[i / 4][i % 4] = (value(row0, i) + value(b_low, i)) * x0[i / 4][i % 4] + (value(row1, i) + value(k_low, i)) * x1[i / 4][i % 4];
        sum_tokens(of_values, later);
        collect_columns(x0, x1, x.triangles, c.a, mine, l);
        collect_columns(x0, x1, x.triangles + 4 * kSmall, c.r, mine, l);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          later[i / 4][i % 4] = -(value(row0, i) + value(b_low, i)) * x0[i / 4][i % 4] - (value(row1, i) + value(k_low, i)) * x1[i / 4][i % 4];
          const float inverse = fast_exp2(-log_p[i / 4][i % 4]);
          x0[i / 4][i % 4] *= inverse, x1[i / 4][i % 4] *= inverse;
        }
        store_rows(p.db + out, row_stride, x0, rows, l), store_rows(p.dk + out, row_stride, x1, rows, l);
      }
      clear(x0), clear(x1);
#pragma unroll 2
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
        dw[i / 4][i % 4] = -of_a;  // which the sum below has of this token itself
        later[i / 4][i % 4] += of_a + value(row1, i) * x1[i / 4][i % 4];
      }
      float slope[8];  // of log(decay) in w
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t raw = raw_w(i);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float w = e ? high_bf16(raw) : low_bf16(raw), here = log_p[i / 2][i % 2 * 2 + e];
          x0[i / 2][i % 2 * 2 + e] *= fast_exp2(here - (l.g + 8 * (i % 2) < rows ? log2_decay(w) : 0.0f));
          x1[i / 2][i % 2 * 2 + e] *= fast_exp2(here);
          slope[2 * i + e] = kDecayScale * sigmoid(w) * sigmoid(-w);
        }
      }
      store_rows(p.da + out, row_stride, x0, rows, l), store_rows(p.dr + out, row_stride, x1, rows, l);
      suffix_sums(later, l);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float z = of_values[2 * (i / 4) + i % 2];
#pragma unroll
        for (int warp = 0; warp < kWarps; warp++) z += x.z_shares[warp * N + mine + 8 * (i / 4) + 2 * l.q + i % 2];
        dw[i / 4][i % 4] = (dw[i / 4][i % 4] + z + later[i / 4][i % 4]) * slope[i];
      }
      store_rows(p.dw + out, row_stride, dw, rows, l);
    }
    sync_block();
    fetch_chunk(segment - 1, 0);
    if (chunks < kChunks)  // the last segment was short: these have not been fetched for the one before it
#pragma unroll 1
      for (int number = chunks; number < kChunks; number++) fetch_chunk(segment - 1, number);
  }
  copy_async_wait<0>();
  if (p.dstate) store_state(p.dstate + at.matrix(p.heads, N), d, l);
#endif  // PORT_TENSOR_CORES
}

}  // namespace
