// The state in a warpgroup's registers: to and from memory, and what becomes of accumulators.
#pragma once
#include "wgmma_prepare.cuh"

namespace {

// A kept state: S in bf16, in the order of registers. 
constexpr int kSlotBytes = kGroupThreads * 16 * 4;

// Few documents and heads leave most of a GPU idle: then a document is cut into parts of equal length that are computed at once, like documents
// (wkv7_wgmma.cu). Where that gives fewer than four parts it doesn't pay.
#if !defined(WKV7_LEAST_PART)
#define WKV7_LEAST_PART 512  // tokens
#endif
struct Cut {
  int parts = 1, tokens;  // of a document
  Cut(int64_t documents, int64_t tokens_each, int64_t heads) : tokens(int(tokens_each)) {
    const int64_t blocks = 2 * 132 / (documents * heads), most = tokens_each / WKV7_LEAST_PART, count = blocks < most ? blocks : most;
    if (count < 4) return;
    tokens = int((tokens_each + count * kTokens - 1) / (count * kTokens)) * kTokens;
    parts = int((tokens_each + tokens - 1) / tokens);
  }
};

#if PORT_WARPGROUPS

// What a block has: one head of one document, or of one part of it. Parts of all documents are numbered together; the piece kernels have two blocks for
// each, of which the second makes the transition.
struct Part : DocumentOf<int> {  // tokens of all documents together are fewer than 2^31
  int document;
  bool is_first, is_last, is_transition;
  DEVICE Part(const int32_t* cu_seqlens, int64_t tokens_each, int heads, int parts, int part_tokens, int all)
      : DocumentOf<int>(cu_seqlens, tokens_each, heads, kTokens), document(number), is_first(true), is_last(true), is_transition(number >= all) {
    if (parts > 1) {
      number = is_transition ? number - all : number;
      document = number / parts;
      const int part = number % parts;
      is_first = part == 0, is_last = part == parts - 1;
      end = int((document + 1) * tokens_each);
      begin = int(document * tokens_each) + part * part_tokens;
      end = end < begin + part_tokens ? end : begin + part_tokens;
      first_slot = begin / kTokens + number;
    }
  }
};

constexpr int kDown = 128, kRight = 2, kHalfRow = 4;  // 16 rows, 16 and 32 columns, in a tile's descriptor

// Where the state at the start of a part's chunk is kept.
DEVICE int64_t slot_offset(const Part& at, int chunk, int heads) { return (int64_t(at.first_slot + chunk) * heads + at.head) * kSlotBytes; }

DEVICE void load_state(float (&s)[32], const float* from, const Place& p) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const float* const pair = from + (16 * p.warp + p.g + 8 * (i % 2)) * N + i / 2 * 8 + 2 * p.q;
    s[2 * i] = from ? pair[0] : 0.0f, s[2 * i + 1] = from ? pair[1] : 0.0f;
  }
}
DEVICE void store_state(float* to, const float (&s)[32], const Place& p) {
#pragma unroll
  for (int i = 0; i < 16; i++) store_pair(to + (16 * p.warp + p.g + 8 * (i % 2)) * N + i / 2 * 8 + 2 * p.q, s[2 * i], s[2 * i + 1]);
}
DEVICE void set_to_identity(float (&s)[32], const Place& p) {
#pragma unroll
  for (int i = 0; i < 32; i++) s[i] = 16 * p.warp + p.g + 8 * (i / 2 % 2) == i / 4 * 8 + 2 * p.q + i % 2 ? 1.0f : 0.0f;
}
DEVICE void scale_columns(float (&s)[32], const unsigned char* factors, const Place& p) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const Pair factor = load_pair(factors + (8 * j + 2 * p.q) * 4);
    s[4 * j] *= factor.first, s[4 * j + 1] *= factor.second, s[4 * j + 2] *= factor.first, s[4 * j + 3] *= factor.second;
  }
}
template <int kCount>
DEVICE void round_all(uint32_t (&to)[kCount], const float* x) {
#pragma unroll
  for (int i = 0; i < kCount; i++) to[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

// Writes a warp's 16 channels of a chunk's `rows` tokens, from accumulators [channel, token], to rows of global memory. `tile` is for all warps,
// each has its columns; `x` points at the first token and channel 0.
DEVICE void store_rows(bf16* x, int64_t row_stride, unsigned char* tile, const float* from, int rows, const Place& p) {
  uint32_t packed[8];
  round_all(packed, from);
  store_matrices_transposed(as_bf16(tile + p.at(0, 2 * p.warp)), packed);
  store_matrices_transposed(as_bf16(tile + p.at(1, 2 * p.warp)), packed + 4);
  sync_warp();
  const int token = p.lane / 2, piece = 2 * p.warp + p.lane % 2, at = token * 128 + ((piece ^ token % 8) << 4);
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (token + 16 * half < rows) store16(x + (token + 16 * half) * row_stride + piece * 8, load16(tile + at + half * 16 * 128));
  sync_warp();  // before the tile is written again
}


// To and from a kept state's slot.
DEVICE void keep(unsigned char* slot, const uint32_t (&s)[16], const Place& p) {
#pragma unroll
  for (int i = 0; i < 4; i++) store16(slot + (i * kGroupThreads + p.thread) * 16, {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]});
}
DEVICE void recall(uint32_t (&s)[16], const unsigned char* slot, const Place& p) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 words = load16(slot + (i * kGroupThreads + p.thread) * 16);
    s[4 * i] = words.x, s[4 * i + 1] = words.y, s[4 * i + 2] = words.z, s[4 * i + 3] = words.w;
  }
}

#endif  // PORT_WARPGROUPS

}  // namespace
