// The wgmma kernel backward. Formulas: wkv7_wgmma.cu.
#pragma once
#include "wgmma_state.cuh"

namespace {

struct Backward {
  Rows w, a, r, b, k, v, dy;
  const float* dfinal_state;
  const unsigned char* saved_state;
  const int32_t* cu_seqlens;
  bf16 *dr, *dw, *dk, *dv, *da, *db;
  float* dstate;
  int64_t tokens_each;
  int heads, parts, part_tokens, all;  // as in Forward
  float* made;                         // [all, H, 64, 64], of the pass that makes the gradients of the states at the parts' starts
};

struct BackwardMemory {  // of a block, in bytes
  using At = Stage<true>;
  static constexpr int states = 2 * At::bytes, triangles = states + 2 * kSquare, dv = triangles + 2 * kSquare, out = dv + kTile, diagonal = out + kTile;
  static constexpr int carry = diagonal + Scratch::kDiagonalBytes, decay = carry + Scratch::kCarryBytes, barriers = decay + 2 * N * 4;
  static constexpr int bytes = barriers + 6 * 8;
};
constexpr int kBackwardThreads = 3 * kGroupThreads, kPartBackwardThreads = 2 * kGroupThreads;

#if PORT_WARPGROUPS

// A 64 x 64 operand to a square tile, by a warpgroup.
DEVICE void store_square(unsigned char* to, const uint32_t (&from)[16], const Place& p) {
#pragma unroll
  for (int i = 0; i < 4; i++) store_matrices(as_bf16(to + p.at(p.warp, 2 * i)), from + 4 * i);
}
// A warp's 16 columns of a tile, from operands that have them as rows.
DEVICE void store_columns(unsigned char* to, const uint32_t (&from)[8], const Place& p) {
#pragma unroll
  for (int i = 0; i < 2; i++) store_matrices_transposed(as_bf16(to + p.at(i, 2 * p.warp)), from + 4 * i);
}

// Recursion over a chunk: U and Z, for collect; dV, in the second half of `both`; and D, from the chunk's end to its start. `s` is S at the chunk's
// start.
DEVICE void recur(float (&d)[32], float (&both)[32], const uint32_t (&s)[16], unsigned char* stage, unsigned char* s_tile, const unsigned char* decay,
                  const Place& p) {
  using At = Stage<true>;
  const uint64_t a = tile_descriptor(stage + At::a), r = tile_descriptor(stage + At::r);
  const uint64_t b = tile_descriptor(stage + At::b), b_low = tile_descriptor(stage + At::b_low);
  const uint64_t v = tile_descriptor(stage + At::v), dy = tile_descriptor(stage + At::dy);
  const uint64_t high = tile_descriptor(stage + At::g_high), low = tile_descriptor(stage + At::g_low);
  const uint64_t t_transposed = tile_descriptor(stage + At::t_transposed), ak_transposed = tile_descriptor(stage + At::ak_transposed);
  scale_columns(d, decay, p);  // E
  pin(d);
  float x[16];                 // X^T
  {
    uint32_t e[16];
    round_all(e, d);
    store_square(s_tile, s, p), store_square(stage + At::e, e, p);
    group_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) group_product<false, 32>(x, s + 4 * i, a + i * kRight, i > 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      group_product<false, 64>(both, e + 4 * i, b_low + i * kRight, i > 0);
      group_product<false, 64>(both, e + 4 * i, b + i * kRight, true);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      group_product<true, false, 32>(x, v + i * kDown, low + kHalfRow + i * kRight, true);
      group_product<true, false, 32>(x, v + i * kDown, high + kHalfRow + i * kRight, true);
      group_product<true, true, 64>(both, dy + i * kDown, low + (2 + i) * kDown, true);
      group_product<true, true, 64>(both, dy + i * kDown, high + (2 + i) * kDown, true);
    }
    group_commit();
    group_wait<0>();
  }
  uint32_t z_high[8], z_low[8];
  {
    uint32_t x_high[8], x_low[8], du_high[8], du_low[8];
    split(x_high, x_low, x), split(du_high, du_low, both);
    float u[16], z[16];
    group_fence();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      group_product<false, 32>(u, x_low + 4 * i, high + i * kRight, i > 0);
      group_product<false, 32>(u, x_high + 4 * i, low + i * kRight, true);
      group_product<false, 32>(u, x_high + 4 * i, high + i * kRight, true);
      group_product<false, 32>(z, du_low + 4 * i, t_transposed + i * kRight, i > 0);
      group_product<false, 32>(z, du_high + 4 * i, t_transposed + kHalfRow + i * kRight, true);
      group_product<false, 32>(z, du_high + 4 * i, t_transposed + i * kRight, true);
    }
    group_commit();
    group_wait<0>();
    uint32_t u_high[8], u_low[8];
    split(u_high, u_low, u), split(z_high, z_low, z);
    store_columns(stage + At::u, u_high, p), store_columns(stage + At::u_low, u_low, p);
    store_columns(stage + At::z, z_high, p), store_columns(stage + At::z_low, z_low, p);
  }
  float dv[16];  // of Z
  group_fence();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    group_product<false, 32>(dv, z_low + 4 * i, ak_transposed + i * kRight, i > 0);
    group_product<false, 32>(dv, z_high + 4 * i, ak_transposed + kHalfRow + i * kRight, true);
    group_product<false, 32>(dv, z_high + 4 * i, ak_transposed + i * kRight, true);
    group_product<true, 64>(d, z_low + 4 * i, a + i * kDown, true);
    group_product<true, 64>(d, z_high + 4 * i, a + i * kDown, true);
    group_product<true, true, 64>(d, dy + i * kDown, r + i * kDown, true);
  }
  group_commit();
  fence_async_proxy();
  group_wait<0>();
  pin(d);
#pragma unroll
  for (int i = 0; i < 16; i++) both[16 + i] += dv[i];
}

// Of the recursion only D.
DEVICE void recur_state(float (&d)[32], unsigned char* stage, const unsigned char* decay, const Place& p) {
  using At = Stage<true>;
  const uint64_t a = tile_descriptor(stage + At::a), r = tile_descriptor(stage + At::r), dy = tile_descriptor(stage + At::dy);
  const uint64_t b = tile_descriptor(stage + At::b), b_low = tile_descriptor(stage + At::b_low), t_transposed = tile_descriptor(stage + At::t_transposed);
  const uint64_t high = tile_descriptor(stage + At::g_high), low = tile_descriptor(stage + At::g_low);
  scale_columns(d, decay, p);  // E
  pin(d);
  float both[32];  // the first half is dU^T; the second comes along, since dy's product needs 64 columns
  {
    uint32_t e[16];
    round_all(e, d);
    group_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      group_product<false, 64>(both, e + 4 * i, b_low + i * kRight, i > 0);
      group_product<false, 64>(both, e + 4 * i, b + i * kRight, true);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      group_product<true, true, 64>(both, dy + i * kDown, low + (2 + i) * kDown, true);
      group_product<true, true, 64>(both, dy + i * kDown, high + (2 + i) * kDown, true);
    }
    group_commit();
    group_wait<0>();
  }
  uint32_t z_high[8], z_low[8];
  {
    uint32_t du_high[8], du_low[8];
    split(du_high, du_low, both);
    float z[16];
    group_fence();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      group_product<false, 32>(z, du_low + 4 * i, t_transposed + i * kRight, i > 0);
      group_product<false, 32>(z, du_high + 4 * i, t_transposed + kHalfRow + i * kRight, true);
      group_product<false, 32>(z, du_high + 4 * i, t_transposed + i * kRight, true);
    }
    group_commit();
    group_wait<0>();
    split(z_high, z_low, z);
  }
  group_fence();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    group_product<true, 64>(d, z_low + 4 * i, a + i * kDown, true);
    group_product<true, 64>(d, z_high + 4 * i, a + i * kDown, true);
    group_product<true, true, 64>(d, dy + i * kDown, r + i * kDown, true);
  }
  group_commit();
  group_wait<0>();
  pin(d);
}

// The sum over this and all later tokens of a chunk, for both of a thread's channels: x[4 j + 2 h + e] is token 8 j + 2 q + e of channel g + 8 h.
DEVICE void suffix_sums(float (&x)[16], const Place& p) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float later = 0.0f;  // of all tokens from 8 (j + 1) on
#pragma unroll
    for (int j = 3; j >= 0; j--) {
      const int i = 4 * j + 2 * h;
      float sum = x[i] + x[i + 1];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float more = shuffle(sum, p.q + step < 4 ? p.lane + step : p.lane);
        sum += p.q + step < 4 ? more : 0.0f;
      }
      const float all = shuffle(sum, p.lane - p.q);
      x[i + 1] = later + sum - x[i];
      x[i] = later + sum;
      later += all;
    }
  }
}

// Gradients of r, w, k, a and b of a chunk, given what recur left.
DEVICE void collect(const Backward& out, int64_t first, int64_t row_stride, int rows, unsigned char* stage, unsigned char* s_tile,
                    unsigned char* triangles, unsigned char* tile, int head, const Place& p) {
  using At = Stage<true>;
  const uint64_t s = tile_descriptor(s_tile), e = tile_descriptor(stage + At::e), m = tile_descriptor(triangles), m_low = tile_descriptor(triangles + kSquare);
  const uint64_t z = tile_descriptor(stage + At::z), u = tile_descriptor(stage + At::u), u_low = tile_descriptor(stage + At::u_low);
  float ar[32], bk[32];  // [da'; dr']^T and [db'; dk']^T
  float start[2];        // of channels g and g + 8: the gradient of log(decay) that comes through S, E S summed over values
  {
    float x[32], of_low[16], diagonal[32];
    group_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) group_product<false, false, 64>(x, z + i * kRight, u + i * kRight, i > 0);
#pragma unroll
    for (int i = 0; i < 4; i++) group_product<false, false, 32>(of_low, z + i * kRight, u_low + i * kRight, i > 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      group_product<true, true, 64>(diagonal, e + i * kDown, s + i * kDown, i > 0);
      group_product<true, false, 64>(bk, e + i * kDown, u + i * kRight, i > 0);
    }
    group_commit();
    group_wait<0>();
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] += of_low[i];
    lower_triangles(x, p);
    uint32_t high[16], low[16];
    split(high, low, x);
    store_square(triangles, high, p), store_square(triangles + kSquare, low, p);
    fence_async_proxy();
    sync_group(3, kGroupThreads);
    // E^T S has what is wanted in its diagonal: that of channel g in lane q = g / 2.
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float mine = 0.0f;
#pragma unroll
      for (int warp = 0; warp < 4; warp++) {
        const int i = 8 * warp + 6 * h;
        mine = p.warp == warp ? (p.g % 2 ? diagonal[i + 1] : diagonal[i]) : mine;
      }
      start[h] = shuffle(mine, p.g * 4 + p.g / 2);
    }
  }
  const auto each = [&](int tile_at, auto&& use) {  // use(i, value) for a thread's elements of a tile
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t values[4];
      load_matrices_transposed(values, as_bf16(stage + tile_at + p.at(i, 2 * p.warp)));
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int at = 4 * (2 * i + n % 2) + n / 2 * 2;
        use(at, low_bf16(values[n])), use(at + 1, high_bf16(values[n]));
      }
    }
  };
  {  // and through the chunk's own tokens: b' (U E) + k' (V E), summed over them all
    float sums[2] = {};
    each(At::b, [&](int i, float x) { sums[i / 2 % 2] += x * bk[i]; });
    each(At::b_low, [&](int i, float x) { sums[i / 2 % 2] += x * bk[i]; });
    each(At::k, [&](int i, float x) { sums[i / 2 % 2] += x * bk[16 + i]; });
    each(At::k_low, [&](int i, float x) { sums[i / 2 % 2] += x * bk[16 + i]; });
#pragma unroll
    for (int h = 0; h < 2; h++) {
      sums[h] += shuffle_xor(sums[h], 1);
      start[h] += sums[h] + shuffle_xor(sums[h], 2);
    }
  }
  pin(bk);
  {
    const uint64_t a = tile_descriptor(stage + At::a), b = tile_descriptor(stage + At::b), b_low = tile_descriptor(stage + At::b_low);
    group_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) group_product<true, false, 64>(ar, s + i * kDown, z + i * kRight, i > 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      group_product<true, false, 64>(ar, b_low + i * kDown, m + i * kRight, true);
      group_product<true, false, 64>(ar, b + i * kDown, m_low + i * kRight, true);
      group_product<true, false, 64>(ar, b + i * kDown, m + i * kRight, true);
      group_product<true, true, 64>(bk, a + i * kDown, m_low + i * kDown, true);
      group_product<true, true, 64>(bk, a + i * kDown, m + i * kDown, true);
    }
    group_commit();
    group_wait<0>();
  }
  // The gradient of log(decay) is a difference of large sums. It is good when its products are taken with what those sums were taken with: the rounded
  // a', r' and the pairs b', k'.
  float later[16], of_a[16];
  each(At::a, [&](int i, float x) { later[i] = of_a[i] = x * ar[i]; });
  each(At::r, [&](int i, float x) { later[i] += x * ar[16 + i]; });
  each(At::b, [&](int i, float x) { later[i] -= x * bk[i]; });
  each(At::b_low, [&](int i, float x) { later[i] -= x * bk[i]; });
  each(At::k, [&](int i, float x) { later[i] -= x * bk[16 + i]; });
  each(At::k_low, [&](int i, float x) { later[i] -= x * bk[16 + i]; });
  suffix_sums(later, p);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const unsigned char* const logs = stage + At::logs + (16 * p.warp + 8 * h + p.g) * At::kLogRow + (8 * j + 2 * p.q) * 4;
      const Pair here = load_pair(logs);
      const float before = j == 0 && p.q == 0 ? 0.0f : bits_to_float(load4(logs - 4));
      const int i = 4 * j + 2 * h;
      const float p_first = fast_exp2(here.first);
      ar[i] *= fast_exp2(before), ar[i + 1] *= p_first;
      ar[16 + i] *= p_first, ar[17 + i] *= fast_exp2(here.second);
      const float inverse0 = fast_exp2(-here.first), inverse1 = fast_exp2(-here.second);
      bk[i] *= inverse0, bk[i + 1] *= inverse1, bk[16 + i] *= inverse0, bk[17 + i] *= inverse1;
      const float step[2] = {here.first - before, here.second - here.first};  // log2 of the decay: kDecayScale kLog2E sigmoid(w)
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float slope = step[n] * (1.0f / kLog2E) * (1.0f - step[n] * (1.0f / (kDecayScale * kLog2E)));  // of log(decay) in w
        later[i + n] = (start[h] - of_a[i + n] + later[i + n]) * slope;
      }
    }
  const int64_t at = first * row_stride + head * N;
  store_rows(out.da + at, row_stride, tile, ar, rows, p);
  store_rows(out.dr + at, row_stride, tile, ar + 16, rows, p);
  store_rows(out.db + at, row_stride, tile, bk, rows, p);
  store_rows(out.dk + at, row_stride, tile, bk + 16, rows, p);
  store_rows(out.dw + at, row_stride, tile, later, rows, p);
}

#endif  // PORT_WARPGROUPS

template <bool kPart>
__global__ void __launch_bounds__(kPart ? kPartBackwardThreads : kBackwardThreads, 1) wkv7_wgmma_backward(const __grid_constant__ Backward p) {
#if PORT_WARPGROUPS
  using At = Stage<true>;
  using Memory = BackwardMemory;
  SHARED_MEMORY(memory);
  check_tiles(memory);
  const Part at(p.cu_seqlens, p.tokens_each, p.heads, p.parts, p.part_tokens, p.all);
  const Place place;
  const int chunks = (at.end - at.begin + kTokens - 1) / kTokens;
  const int64_t row_stride = int64_t(p.heads) * N;
  uint64_t *const arrived = reinterpret_cast<uint64_t*>(memory + Memory::barriers), *const ready = arrived + 2, *const handed = arrived + 4;
  const auto fetch = [&](int turn) {  // by one thread; turn 0 is the last chunk
    unsigned char* const stage = memory + turn % 2 * At::bytes;
    uint64_t* const barrier = arrived + turn % 2;
    const int token = at.begin + (chunks - 1 - turn) * kTokens;
    mbarrier_expect(barrier, 7 * kTile);
    load_rows(stage + At::w, p.w, at.head, token, barrier), load_rows(stage + At::a, p.a, at.head, token, barrier);
    load_rows(stage + At::b, p.b, at.head, token, barrier), load_rows(stage + At::k, p.k, at.head, token, barrier);
    load_rows(stage + At::r, p.r, at.head, token, barrier), load_rows(stage + At::v, p.v, at.head, token, barrier);
    load_rows(stage + At::dy, p.dy, at.head, token, barrier);
  };
  // T^T is upper triangular: the quarter that is never written otherwise becomes zeros.
  if (threadIdx.x < 128) {
    const int row = 16 + place.thread / 8, piece = place.thread % 8;
    for (int number = 0; number < 2; number++)
      if (piece % 4 < 2) store16(memory + number * At::bytes + At::t_transposed + row * 128 + ((piece ^ row % 8) << 4), {0, 0, 0, 0});
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; i++) mbarrier_init(arrived + i, 1);
    for (int i = 0; i < 2; i++) mbarrier_init(handed + i, 4);
  }
  fence_async_proxy();
  sync_block();
  if (threadIdx.x == 0)
    for (int turn = 0; turn < 2 && turn < chunks; turn++) fetch(turn);

  if (threadIdx.x < kGroupThreads) {
    if constexpr (!kPart) registers_decrease<128>();
#pragma unroll 1
    for (int turn = 0; turn < chunks; turn++) {
      const int number = turn % 2;
      unsigned char* const stage = memory + number * At::bytes;
      const Scratch scratch{memory + Memory::carry, memory + Memory::diagonal, stage + At::t_transposed, memory + Memory::decay + number * N * 4};
      mbarrier_wait(arrived + number, turn / 2 % 2);
      prepare<true>(stage, scratch, ready + number, at.end - at.begin - (chunks - 1 - turn) * kTokens, turn % 4, place);
    }
  } else if (kPart) {
    float d[32];
    load_state(d, nullptr, place);
#pragma unroll 1
    for (int turn = 0; turn < chunks; turn++) {
      const int number = turn % 2;
      mbarrier_wait(ready + number, turn / 2 % 2);
      recur_state(d, memory + number * At::bytes, memory + Memory::decay + number * N * 4, place);
      sync_group(2, kGroupThreads);  // all are through with the chunk
      if (place.thread == 0 && turn + 2 < chunks) fetch(turn + 2);
    }
    store_state(p.made + at.matrix(p.heads, N), d, place);
  } else if (threadIdx.x < 2 * kGroupThreads) {
    registers_increase<184>();
    const int64_t slot_stride = int64_t(p.heads) * kSlotBytes;
    const unsigned char* slot = p.saved_state + slot_offset(at, chunks, p.heads);
    float d[32];
    uint32_t s[16];
    load_state(d, p.dfinal_state ? p.dfinal_state + at.matrix(p.heads, N) : nullptr, place);
    if (chunks) recall(s, slot -= slot_stride, place);
#pragma unroll 1
    for (int turn = 0; turn < chunks; turn++) {
      const int number = turn % 2, chunk = chunks - 1 - turn;
      unsigned char* const stage = memory + number * At::bytes;
      mbarrier_wait(ready + number, turn / 2 % 2);
      float both[32];
      recur(d, both, s, stage, memory + Memory::states + number * kSquare, memory + Memory::decay + number * N * 4, place);
      if (chunk) recall(s, slot -= slot_stride, place);
      sync_warp();
      if (place.lane == 0) mbarrier_arrive(handed + number);
      const int64_t first = at.begin + chunk * kTokens;
      store_rows(p.dv + first * row_stride + at.head * N, row_stride, memory + Memory::dv, both + 16, at.end - int(first), place);
    }
    if (p.dstate && at.is_first) store_state(p.dstate + (int64_t(at.document) * p.heads + at.head) * N * N, d, place);
  } else {
    registers_increase<192>();
#pragma unroll 1
    for (int turn = 0; turn < chunks; turn++) {
      const int number = turn % 2, chunk = chunks - 1 - turn, first = at.begin + chunk * kTokens;
      mbarrier_wait(handed + number, turn / 2 % 2);
      collect(p, first, row_stride, at.end - first, memory + number * At::bytes, memory + Memory::states + number * kSquare,
              memory + Memory::triangles, memory + Memory::out, at.head, place);
      sync_group(3, kGroupThreads);  // all are through with the chunk
      if (place.thread == 0 && turn + 2 < chunks) fetch(turn + 2);
    }
  }
#else
  (void)p;
  wrong_target();
#endif  // PORT_WARPGROUPS
}

}  // namespace
