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
//   dlog(decay_t) = colsum(E * S) + sum over all s of (b' (U E) + k' (V E))_s - (a' da')_t
//                   + sum over s >= t of (a' da' + r' dr' - b' db' - k' dk')_s
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
#include "chunked_backward.cuh"
#include "chunked_state.cuh"

namespace {

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
  const Document at(p.cu_seqlens, p.tokens_each, p.heads, kSegment);
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
  load_state(s, p.state ? p.state + at.matrix(p.heads, N) : nullptr, l);
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
    fetch_chunk(segment + 1);  // after the barrier: all warps have left that buffer
    if (p.saved_state) keep_state(p.saved_state + (int64_t(at.first_slot + segment) * p.heads + at.head) * kSlotBytes, s);
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
  store_state(p.final_state + at.matrix(p.heads, N), s, l);
#endif  // PORT_TENSOR_CORES
}

// --- Entry points ---------------------------------------------------------------------------------------------------------

constexpr size_t kForwardBytes = ForwardMemory::elements * sizeof(bf16);
constexpr size_t kBackwardBytes = BackwardMemory::elements * sizeof(bf16);
static_assert(kForwardBytes <= 99 * 1024 && kBackwardBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 have 99 KB");

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
  if (!PORT_HAS_TENSOR_CORES || dtype != 1 || head_size != N) return kNoSuchKernel;
  const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  const Forward p{in(r), in(w), in(k), in(v), in(a), in(b), state, cu_seqlens, static_cast<bf16*>(y), final_state,
                  static_cast<unsigned char*>(saved_state), tokens_each, heads};
  return launch(wkv7_chunked_forward, unsigned(documents * heads), kThreads, kForwardBytes, stream, p);
}

int wkv7_chunked_backward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* dy, const float* dfinal_state,
                          const void* r, const void* w, const void* k, const void* v, const void* a, const void* b, const int32_t* cu_seqlens,
                          const void* saved_state, const void*, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* dstate,
                          int64_t stream) {
  if (!PORT_HAS_TENSOR_CORES || dtype != 1 || head_size != N) return kNoSuchKernel;
  const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  const auto out = [](void* x) { return static_cast<bf16*>(x); };
  const Backward p{in(dy), in(r), in(w), in(k), in(v), in(a), in(b), dfinal_state, static_cast<const unsigned char*>(saved_state), cu_seqlens,
                   out(dr), out(dw), out(dk), out(dv), out(da), out(db), dstate, tokens_each, heads};
  return launch(wkv7_chunked_backward, unsigned(documents * heads), kThreads, kBackwardBytes, stream, p);
}
}
