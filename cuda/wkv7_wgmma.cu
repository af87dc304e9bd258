// WKV7 on the tensor cores of sm_90a by warpgroups: bf16, head size 64. Same contract as wkv7_chunked.cu, which serves other GPUs.
//
// 32 tokens are a chunk. With P_t the product of a chunk's decays up to t,
//   a' = a P_{t-1},  r' = r P_t,  b' = b / P_t,  k' = k / P_t                       rows t of 32 x 64 matrices
//   A_ab = a' b'^T   A_ak = a' k'^T (strictly lower triangles)   A_rb = r' b'^T   A_rk = r' k'^T (lower)   T = (I - A_ab)^-1
//   X^T = S a'^T + V^T A_ak^T     U^T = X^T T^T     Y^T = S r'^T + U^T A_rb^T + V^T A_rk^T     S <- (S + U^T b' + V^T k') diag(P_32)
// so that every product has the 64 value rows of the state, or two stacked chunks of 32 tokens, as the M = 64 of wgmma. Backward, from D = dS at the chunk's
// end, with E = D diag(P_32):
//   dU^T = E b'^T + dY^T A_rb     Z^T = dU^T T     dV^T = E k'^T + dY^T A_rk + Z^T A_ak     D at the chunk's start = E + Z^T a' + dY^T r'
//   [da'; dr']^T = S^T [Z; dY]^T + [b'; k']^T M^T    [db'; dk']^T = E^T [U; V]^T + [a'; r']^T M     M = [Z; dY] [U; V]^T, its triangles as in A_ab .. A_rk
//   dlog(decay_t) = colsum(E * S) + sum over all s of (b' (U E) + k' (V E))_s - (a' da')_t + sum over s >= t of (a' da' + r' dr' - b' db' - k' dk')_s
//
// A block is one head of one document, walked chunk by chunk. Its warpgroups, two chunks of shared memory and the mbarriers between them:
//   prepare   waits for TMA (`arrived`); everything that doesn't depend on the state, ending with T                           -> `ready`
//   state     (forward) X, U, Y and S, which stays in its registers
//   recur     (backward) U, dU, Z, dV and D, which stays in its registers                                                     -> `handed`
//   collect   (backward, a chunk behind) M and the other gradients
// The last of them fetches the chunk after the next into the place of the one that it is through with.
// bf16 holds 8 bits, so what is used where errors would add up is split into a high and a low bf16 part ("pair"): b', k', T, A, X, U,
// dU, Z and the triangles of Z U^T and so on. S and E are single operands, and U where it is added to S. Measured effect: tests/test_cuda_wkv7.py.
// Forward keeps for backward S at the start of each chunk, as the operand that it was there (256 bytes per token and head).
//
// A document that is cut into parts (Cut): with H the state that a part makes of zero and G = prod_t (diag(decay_t) + a_t b_t^T) its transition, S at the
// next part's start is S G + H; both are a forward pass without outputs, G from the identity and v = 0. Then all parts run like documents. Backward, with
// C the gradient of S at a part's start when that at its end is zero: D at the end of the part before is D G^T + C.
#include "wgmma_backward.cuh"
#include "wgmma_state.cuh"

namespace {

struct Forward {
  Rows w, a, r, b, k, v;              // [tokens, H, 64]
  const float* state;                 // [documents, H, 64, 64] or null: zeros
  const int32_t* cu_seqlens;          // [documents + 1] or null: documents of tokens_each tokens
  bf16* y;
  float* final_state;
  unsigned char* saved_state;         // [chunks, H, kSlotBytes] or null
  int64_t tokens_each;
  int heads, parts, part_tokens, all;  // parts of a document, and of all documents
  float *made, *transitions;           // [all, H, 64, 64], of the pass that makes H and G
};

struct ForwardMemory {  // of a block, in bytes
  using At = Stage<false>;
  static constexpr int t_transposed = 2 * At::bytes, y = t_transposed + kTile, diagonal = y + kTile, carry = diagonal + Scratch::kDiagonalBytes;
  static constexpr int decay = carry + Scratch::kCarryBytes, barriers = decay + 2 * N * 4, bytes = barriers + 4 * 8;
};
constexpr int kForwardThreads = 2 * kGroupThreads;

template <bool kPart>
__global__ void __launch_bounds__(kForwardThreads, 2) wkv7_wgmma_forward(const __grid_constant__ Forward p) {
#if PORT_WARPGROUPS
  using At = Stage<false>;
  using Memory = ForwardMemory;
  SHARED_MEMORY(memory);
  check_tiles(memory);
  const Part at(p.cu_seqlens, p.tokens_each, p.heads, p.parts, p.part_tokens, p.all);
  const Place place;
  const int chunks = (at.end - at.begin + kTokens - 1) / kTokens;
  uint64_t *const arrived = reinterpret_cast<uint64_t*>(memory + Memory::barriers), *const ready = arrived + 2;
  const auto fetch = [&](int chunk) {  // by one thread
    unsigned char* const stage = memory + chunk % 2 * At::bytes;
    uint64_t* const barrier = arrived + chunk % 2;
    const int token = at.begin + chunk * kTokens;
    mbarrier_expect(barrier, 6 * kTile);
    load_rows(stage + At::w, p.w, at.head, token, barrier), load_rows(stage + At::a, p.a, at.head, token, barrier);
    load_rows(stage + At::b, p.b, at.head, token, barrier), load_rows(stage + At::k, p.k, at.head, token, barrier);
    load_rows(stage + At::r, p.r, at.head, token, barrier);
    load_rows(stage + At::v, p.v, at.head, kPart && at.is_transition ? p.all * p.part_tokens : token, barrier);  // there are zeros beyond all tokens
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; i++) mbarrier_init(arrived + i, 1);
    fence_async_proxy();
    for (int chunk = 0; chunk < 2 && chunk < chunks; chunk++) fetch(chunk);
  }
  sync_block();

  if (threadIdx.x < kGroupThreads) {
    registers_decrease<112>();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int number = chunk % 2;
      const Scratch scratch{memory + Memory::carry, memory + Memory::diagonal, memory + Memory::t_transposed, memory + Memory::decay + number * N * 4};
      mbarrier_wait(arrived + number, chunk / 2 % 2);
      prepare<false>(memory + number * At::bytes, scratch, ready + number, at.end - at.begin - chunk * kTokens, chunk % 4, place);
    }
  } else {
    registers_increase<144>();
    const int64_t row_stride = int64_t(p.heads) * N;
    bf16* y = p.y + at.begin * row_stride + at.head * N;
    float s[32];
    load_state(s, p.state ? p.state + at.matrix(p.heads, N) : nullptr, place);
    if (kPart && at.is_transition) set_to_identity(s, place);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int number = chunk % 2;
      unsigned char* const stage = memory + number * At::bytes;
      const uint64_t a = tile_descriptor(stage + At::a), b = tile_descriptor(stage + At::b), b_low = tile_descriptor(stage + At::b_low);
      const uint64_t v = tile_descriptor(stage + At::v), high = tile_descriptor(stage + At::g_high), low = tile_descriptor(stage + At::g_low);
      mbarrier_wait(ready + number, chunk / 2 % 2);
      float x[32];  // X^T and Y^T
      {
        uint32_t operand[16];
        round_all(operand, s);
        if (!kPart && p.saved_state) keep(p.saved_state + slot_offset(at, chunk, p.heads), operand, place);
        group_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) group_product<false, 64>(x, operand + 4 * i, a + i * kRight, i > 0);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          group_product<true, false, 64>(x, v + i * kDown, low + kHalfRow + i * kRight, true);
          group_product<true, false, 64>(x, v + i * kDown, high + kHalfRow + i * kRight, true);
        }
        group_commit();
        group_wait<0>();
      }
      uint32_t u[8], u_low[8];
      {
        uint32_t x_high[8], x_low[8];
        split(x_high, x_low, x);
        float sums[16];
        group_fence();
#pragma unroll
        for (int i = 0; i < 2; i++) {
          group_product<false, 32>(sums, x_low + 4 * i, high + i * kRight, i > 0);
          group_product<false, 32>(sums, x_high + 4 * i, low + i * kRight, true);
          group_product<false, 32>(sums, x_high + 4 * i, high + i * kRight, true);
        }
        group_commit();
        group_wait<0>();
        split(u, u_low, sums);
      }
      float out[16];
#pragma unroll
      for (int i = 0; i < 16; i++) out[i] = x[16 + i];
      group_fence();
#pragma unroll
      for (int i = 0; i < 2 && !kPart; i++) {
        group_product<false, 32>(out, u_low + 4 * i, high + 2 * kDown + i * kRight, true);
        group_product<false, 32>(out, u + 4 * i, low + 2 * kDown + i * kRight, true);
        group_product<false, 32>(out, u + 4 * i, high + 2 * kDown + i * kRight, true);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        group_product<true, 64>(s, u + 4 * i, b_low + i * kDown, true);
        group_product<true, 64>(s, u + 4 * i, b + i * kDown, true);
        group_product<true, true, 64>(s, v + i * kDown, b_low + (2 + i) * kDown, true);  // k' and its low part follow b'
        group_product<true, true, 64>(s, v + i * kDown, b + (2 + i) * kDown, true);
      }
      group_commit();
      group_wait<0>();
      scale_columns(s, memory + Memory::decay + number * N * 4, place);
      sync_group(2, kGroupThreads);  // all are through with the chunk
      if (place.thread == 0 && chunk + 2 < chunks) fetch(chunk + 2);
      if (kPart) continue;
      store_rows(y, row_stride, memory + Memory::y, out, at.end - at.begin - chunk * kTokens, place);
      y += kTokens * row_stride;
    }
    if (kPart)
      store_state((at.is_transition ? p.transitions : p.made) + at.matrix(p.heads, N), s, place);
    else if (at.is_last)
      store_state(p.final_state + (int64_t(at.document) * p.heads + at.head) * N * N, s, place);
  }
#else
  (void)p;
  wrong_target();
#endif  // PORT_WARPGROUPS
}

// S at each part's start, or D at each part's end, one head of one document a block: `to` of a part is that of the part before times its factor (or, from the
// last part on, of the part after times its factor transposed), plus what it made. The first is `begin`, or zeros. All [.., H, 64, 64], fp32.
constexpr int kJoinThreads = 256;
struct Join {
  const float *begin, *factors, *made;
  float* to;
  int heads, parts, backward;
};
struct JoinMemory {
  static constexpr int row = N + 4, bytes = 2 * N * row * 4;  // 4 more against bank conflicts
};
__global__ void __launch_bounds__(kJoinThreads) wkv7_wgmma_join(Join p) {
  SHARED_MEMORY(memory);
  constexpr int kRow = JoinMemory::row, kOwn = 16;
  float *const now = reinterpret_cast<float*>(memory), *const factor = now + N * kRow;
  const int document = int(blockIdx.x) / p.heads, head = int(blockIdx.x) % p.heads, row = int(threadIdx.x) / 4, column = int(threadIdx.x) % 4 * kOwn;
  const auto matrix = [&](int64_t number) { return (number * p.heads + head) * N * N + row * N + column; };
  float own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i++) own[i] = p.begin ? p.begin[matrix(document) + i] : 0.0f;
#pragma unroll 1
  for (int turn = 0; turn < p.parts; turn++) {
    const int64_t at = matrix(int64_t(document) * p.parts + (p.backward ? p.parts - 1 - turn : turn));
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      p.to[at + i] = now[row * kRow + column + i] = own[i];
      factor[p.backward ? (column + i) * kRow + row : row * kRow + column + i] = p.factors[at + i];
      own[i] = p.made[at + i];
    }
    sync_block();
    for (int k = 0; k < N; k++) {
      const float left = now[row * kRow + k];
#pragma unroll
      for (int i = 0; i < kOwn; i++) own[i] += left * factor[k * kRow + column + i];
    }
    sync_block();
  }
}

// --- Entry points ---------------------------------------------------------------------------------------------------------

static_assert(2 * (ForwardMemory::bytes + 1024) <= 228 * 1024 && BackwardMemory::bytes <= 227 * 1024, "two blocks, and one, have a place on an SM");

}  // namespace

extern "C" {

// Bytes that forward keeps for backward, for `tokens` tokens in all.
int64_t wkv7_wgmma_saved_state_bytes(int, int64_t documents, int64_t tokens, int64_t heads) {
  return (tokens / kTokens + documents * Cut(documents, tokens / documents, heads).parts) * heads * kSlotBytes;
}
// Where documents are cut: three matrices for each part and head, the transitions first; backward writes over the two others.
int64_t wkv7_wgmma_saved_sa_bytes(int, int64_t documents, int64_t tokens, int64_t heads) {
  const int parts = Cut(documents, tokens / documents, heads).parts;
  return parts > 1 ? 3 * documents * parts * heads * N * N * 4 : 0;
}

// As in wkv7_chunked.cu.
int wkv7_wgmma_forward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* r, const void* w, const void* k,
                       const void* v, const void* a, const void* b, const float* state, const int32_t* cu_seqlens, void* y, float* final_state,
                       void* saved_state, void* saved_sa, int64_t stream) {
  if (!PORT_HAS_TENSOR_CORES || dtype != 1 || head_size != N) return kNoSuchKernel;
  Forward p{{}, {}, {}, {}, {}, {}, state, cu_seqlens, static_cast<bf16*>(y), final_state, static_cast<unsigned char*>(saved_state), tokens_each, heads,
            1, int(tokens_each), documents, nullptr, nullptr};
  const int64_t tokens = cu_seqlens ? tokens_each : documents * tokens_each;
  const std::pair<Rows*, const void*> tensors[] = {{&p.w, w}, {&p.a, a}, {&p.r, r}, {&p.b, b}, {&p.k, k}, {&p.v, v}};
  for (const auto& [rows, tensor] : tensors)
    if (const int error = describe_rows(*rows, tensor, tokens, heads, kTokens)) return error;
  const Cut cut(documents, tokens_each, heads);
  if (!cu_seqlens && saved_sa && cut.parts > 1) {
    p.parts = cut.parts, p.part_tokens = cut.tokens, p.all = documents * cut.parts;
    const int64_t matrices = int64_t(p.all) * heads * N * N;
    float* const starts = static_cast<float*>(saved_sa) + 2 * matrices;
    p.transitions = static_cast<float*>(saved_sa), p.made = p.transitions + matrices;
    p.state = nullptr;
    if (const int error = launch_warpgroups(wkv7_wgmma_forward<true>, unsigned(2 * p.all * heads), kForwardThreads, ForwardMemory::bytes, stream, p))
      return error;
    const Join join{state, p.transitions, p.made, starts, heads, p.parts, 0};
    if (const int error = launch(wkv7_wgmma_join, unsigned(documents * heads), kJoinThreads, JoinMemory::bytes, stream, join)) return error;
    p.state = starts;
  }
  return launch_warpgroups(wkv7_wgmma_forward<false>, unsigned(p.all * heads), kForwardThreads, ForwardMemory::bytes, stream, p);
}

int wkv7_wgmma_backward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* dy, const float* dfinal_state,
                        const void* r, const void* w, const void* k, const void* v, const void* a, const void* b, const int32_t* cu_seqlens,
                        const void* saved_state, const void* saved_sa, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* dstate,
                        int64_t stream) {
  if (!PORT_HAS_TENSOR_CORES || dtype != 1 || head_size != N) return kNoSuchKernel;
  const auto out = [](void* x) { return static_cast<bf16*>(x); };
  Backward p{{}, {}, {}, {}, {}, {}, {}, dfinal_state, static_cast<const unsigned char*>(saved_state), cu_seqlens,
             out(dr), out(dw), out(dk), out(dv), out(da), out(db), dstate, tokens_each, heads, 1, int(tokens_each), documents, nullptr};
  const int64_t tokens = cu_seqlens ? tokens_each : documents * tokens_each;
  const std::pair<Rows*, const void*> tensors[] = {{&p.w, w}, {&p.a, a}, {&p.r, r}, {&p.b, b}, {&p.k, k}, {&p.v, v}, {&p.dy, dy}};
  for (const auto& [rows, tensor] : tensors)
    if (const int error = describe_rows(*rows, tensor, tokens, heads, kTokens)) return error;
  const Cut cut(documents, tokens_each, heads);
  if (!cu_seqlens && saved_sa && cut.parts > 1) {
    p.parts = cut.parts, p.part_tokens = cut.tokens, p.all = documents * cut.parts;
    const int64_t matrices = int64_t(p.all) * heads * N * N;
    // What is behind the transitions was forward's scratch memory and is backward's now: no backward needs what it holds before.
    const float* const transitions = static_cast<const float*>(saved_sa);
    float *const made = const_cast<float*>(transitions) + matrices, *const ends = made + matrices;
    p.dfinal_state = nullptr, p.made = made;
    if (const int error = launch_warpgroups(wkv7_wgmma_backward<true>, unsigned(p.all * heads), kPartBackwardThreads, BackwardMemory::bytes, stream, p))
      return error;
    const Join join{dfinal_state, transitions, made, ends, heads, p.parts, 1};
    if (const int error = launch(wkv7_wgmma_join, unsigned(documents * heads), kJoinThreads, JoinMemory::bytes, stream, join)) return error;
    p.dfinal_state = ends;
  }
  return launch_warpgroups(wkv7_wgmma_backward<false>, unsigned(p.all * heads), kBackwardThreads, BackwardMemory::bytes, stream, p);
}
}
