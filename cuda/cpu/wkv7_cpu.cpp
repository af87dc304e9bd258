// wkv7 on a CPU, exact in fp32: one head of one sequence at a time, in chunks of eight tokens.
//
// Within a chunk let P_t be the product of its decays up to token t (P_0 = 1), and
//   a' = a_t P_{t-1}    r' = r_t P_t    k' = k_t / P_t    b' = b_t / P_t          (P >= 0.545^8 = 0.0078: nothing is lost in fp32)
// Then S'_t = S_t / P_t doesn't decay, and with S the state at the chunk's start
//   u_t = S a'_t + sum_{s<t} (a'_t k'_s) v_s + (a'_t b'_s) u_s                    (u_t = S_{t-1} a_t: solved token by token)
//   y_t = S r'_t + sum_{s<=t} (r'_t k'_s) v_s + (r'_t b'_s) u_s
//   next S = (S + sum_s v_s k'_s^T + u_s b'_s^T) P_L
// Backward, with G the gradient of S'_L, and D that of u:
//   D_t  = G b'_t + sum_{s>t} (a'_s b'_t) D_s + sum_{s>=t} (r'_s b'_t) dy_s        dv_t the same with k'_t for b'_t
//   dk'_t = G^T v_t + sum_{s>t} (D_s v_t) a'_s + sum_{s>=t} (dy_s v_t) r'_s         db'_t the same with u_t for v_t
//   da'_t = S^T D_t + sum_{s<t} (D_t v_s) k'_s + (D_t u_s) b'_s                     dr'_t the same with dy_t for D_t and s<=t
//   earlier G = (G + sum_s D_s a'_s^T + dy_s r'_s^T) P_L of the chunk before
// so all the work is in products of an N x N matrix with 2 kChunk rows, in registers (small_products.h).
//
// The decay's gradient: let g_t = sum_i G_t S_t (elementwise, per column) after token t. Writing out S_t and G_t:
//   decay_t ddecay_t = g_{t-1} - a_t da_t      and      g_t = decay_t ddecay_t + b_t db_t + k_t dk_t - r_t dr_t.
// Twice in a segment g is summed directly, or rounding would pile up; what a walk from one sum to the next misses by is shared out.
#include "wkv7_cpu.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "small_products.h"
#include "vec.h"

namespace wkv7_cpu {
namespace {

using small::Fetch;
using small::multiply;
using vec::Float;
using vec::kLanes;

constexpr int64_t kChunk = 8;  // tokens; their decays and the products between them cost little next to the N x N products
constexpr int64_t kColumns = 2 * kChunk;
constexpr int64_t kChunks = kSegment / kChunk;  // in a segment
constexpr int64_t kWalk = kChunks / 2;          // chunks between two direct sums of g
static_assert(kSegment % (2 * kChunk) == 0, "a segment is made of two walks of whole chunks");

// exp(-kMaxLogDecay s) for s in [0, 1]: 1 - s Q(s), where Q interpolates (1 - exp(-kMaxLogDecay s)) / s at the zeros of Chebyshev's polynomial
// of degree 6. Off by 2.2e-9, and by nothing where s is small, so decays near 1 don't drift.
inline Float decay_of(Float s) {
  Float q = vec::splat(-5.34887835e-5f);
  q = q * s + 6.67226315e-4f;
  q = q * s - 5.63044064e-3f;
  q = q * s + 3.71863838e-2f;
  q = q * s - 1.83939552e-1f;
  q = q * s + 6.06530657e-1f;
  return 1.0f - q * s;
}

// ---- rows of a [B, T, H, N] tensor in and out -------------------------------------------------------------------------------------

using vec::Bf16;
using Half = torch::headeronly::Half;

using vec::load;
inline Float load(const Half* p) {
  Float v{};
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}
using vec::store;
inline void store(Half* p, Float v) {
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<Half>(static_cast<float>(v[lane]));
}

// ---- scratch memory of a thread, kept between calls (page faults are expensive) -----------------------------------------------------------

class Scratch {
 public:
  float* take(int64_t floats) {
    float* p = next_;
    next_ += (floats + 15) / 16 * 16;
    return p;
  }
  // Room for so many floats (each take rounded up to 64 bytes), from the start again.
  void reset(int64_t floats) {
    if (floats > size_) {
      release();
      // Not std::aligned_alloc: Windows has none.
      memory_ = static_cast<float*>(::operator new(sizeof(float) * floats, kCacheLine));
      size_ = floats;
    }
    next_ = memory_;
  }
  ~Scratch() { release(); }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  void release() {
    ::operator delete(memory_, kCacheLine);
    memory_ = nullptr, size_ = 0;
  }
  float *memory_ = nullptr, *next_ = nullptr;
  int64_t size_ = 0;
};
thread_local Scratch scratch;

// ---- one head of one sequence -----------------------------------------------------------------------------------------------------

struct Unit {
  int64_t document, head, batch, begin, end;  // tokens begin .. end-1 of row `batch`
  int64_t first_saved;                        // index of its first kept state

  Unit(const Problem& p, int64_t unit) : document(unit / p.H), head(unit % p.H) {
    if (p.cu_seqlens) {
      batch = 0, begin = p.cu_seqlens[document], end = p.cu_seqlens[document + 1];
      first_saved = begin / kSegment;
    } else {
      batch = document, begin = 0, end = p.T;
      first_saved = document * ((p.T - 1) / kSegment);
    }
  }
  int64_t state(const Problem& p) const { return (document * p.H + head) * p.N * p.N; }
  int64_t saved(const Problem& p, int64_t segment) const { return ((first_saved + segment - 1) * p.H + head) * p.N * p.N; }
  int64_t row(const Problem& p, int64_t t) const { return ((batch * p.T + t) * p.H + head) * p.N; }
};

template <class T>
inline const T* token(const Rows& rows, const Unit& u, int64_t t) {
  return static_cast<const T*>(rows.data) + u.batch * rows.batch + t * rows.time + u.head * rows.head;
}

template <class T>
inline void read(float* to, const Rows& rows, const Unit& u, int64_t t, int64_t N) {
  const T* from = token<T>(rows, u, t);
  for (int64_t c = 0; c < N; c += kLanes) vec::store(to + c, load(from + c));
}
// Rows of `count` tokens from t on to a dense tensor, past the caches: nothing here reads them again, and memory would be read only to be
// overwritten.
template <class T>
void write(T* tensor, const Problem& p, const Unit& u, int64_t t, int64_t count, const float* from) {
  constexpr int64_t line = vec::kLine / sizeof(T);
  for (int64_t i = 0; i < count; ++i, from += p.N) {
    T* to = tensor + u.row(p, t + i);
    if (p.N % line == 0 && vec::starts_line(to)) {
      for (int64_t c = 0; c < p.N; c += line) {
        if constexpr (std::is_same_v<T, Bf16>) {
          vec::stream_line(to + c, from + c);
        } else {
          alignas(vec::kLine) T whole[line];
          for (int64_t l = 0; l < line; l += kLanes) store(whole + l, vec::load(from + c + l));
          vec::stream_line(to + c, static_cast<const void*>(whole));
        }
      }
    } else {
      for (int64_t c = 0; c < p.N; c += kLanes) store(to + c, vec::load(from + c));
    }
  }
}

// ---- a chunk ----------------------------------------------------------------------------------------------------------------------

// Blocks of rows of N floats, token after token within a letter's part: ar = [a'; r'], kb = [k'; b'], ...
struct Chunk {
  float *decays;    // [kChunk + 1]: P_0 = 1 .. P_L
  float *inverses;  // [kChunk]: 1 / P_1 .. 1 / P_L
  float *slopes;    // [kChunk]: d log(decay) / dw (backward)
  float *ar, *kb;
  float *vuy;   // [v; u; y]; backward: [v; u]
  float *vddy;  // [dv; D; dy] (backward)
  float *dkb;   // [dk'; db'] (backward)
  float *products;  // [kColumns, kColumns]: [D; dy] times [v; u]^T (backward)

  static int64_t floats(int64_t N) { return (3 * kChunk + 1 + 2 * kColumns + 3 * kChunk + 3 * kChunk + kColumns) * N + kColumns * kColumns; }
  void take(Scratch& scratch, int64_t N) {
    decays = scratch.take((kChunk + 1) * N), inverses = scratch.take(kChunk * N), slopes = scratch.take(kChunk * N);
    ar = scratch.take(kColumns * N), kb = scratch.take(kColumns * N);
    vuy = scratch.take(3 * kChunk * N), vddy = scratch.take(3 * kChunk * N), dkb = scratch.take(kColumns * N);
    products = scratch.take(kColumns * kColumns);
    for (int64_t c = 0; c < N; ++c) decays[c] = 1.0f;
  }
  const float* decay(int64_t N) const { return decays + kChunk * N; }             // P_L
  const float* inverse(int64_t N) const { return inverses + (kChunk - 1) * N; }  // 1 / P_L
};

// Reads tokens t .. t + count - 1 (what backward alone needs, only for it). Tokens that a chunk lacks neither decay nor change anything: their rows are zeros.
template <class T>
__attribute__((noinline)) void read_chunk(Chunk& chunk, const Problem& p, const Unit& u, int64_t t, int64_t count, bool backward) {
  const int64_t N = p.N, half = kChunk * N;
  const T *w = token<T>(p.w, u, t), *r = token<T>(p.r, u, t), *k = token<T>(p.k, u, t), *v = token<T>(p.v, u, t),
          *a = token<T>(p.a, u, t), *b = token<T>(p.b, u, t);
  for (int64_t c = 0; c < N; c += kLanes) {
    Float decays = vec::splat(1.0f);
    for (int64_t i = 0; i < count; ++i) {
      const Float e = vec::exp(-load(w + i * p.w.time + c));
      const Float sigmoid = vec::reciprocal(1.0f + e);
      const int64_t at = i * N + c;
      if (backward) vec::store(chunk.slopes + at, -kMaxLogDecay * sigmoid * (e * sigmoid));
      vec::store(chunk.ar + at, load(a + i * p.a.time + c) * decays);
      decays *= decay_of(sigmoid);
      const Float inverse = vec::reciprocal(decays);
      vec::store(chunk.decays + at + N, decays);
      if (backward) vec::store(chunk.inverses + at, inverse);
      vec::store(chunk.ar + half + at, load(r + i * p.r.time + c) * decays);
      vec::store(chunk.kb + at, load(k + i * p.k.time + c) * inverse);
      vec::store(chunk.kb + half + at, load(b + i * p.b.time + c) * inverse);
      vec::store(chunk.vuy + at, load(v + i * p.v.time + c));
    }
  }
  for (int64_t i = count; i < kChunk; ++i) {
    std::memcpy(chunk.decays + (i + 1) * N, chunk.decays + i * N, sizeof(float) * N);
    for (float* rows : {chunk.slopes, chunk.ar, chunk.ar + half, chunk.kb, chunk.kb + half, chunk.vuy, chunk.vuy + half})
      std::memset(rows + i * N, 0, sizeof(float) * N);
  }
}

// The three products that everything is made of; rows, x and y are blocks of kColumns rows of N floats. Head size 64, the usual one, is
// compiled by itself.
template <class Compute>
inline void with_head_size(int64_t N, const Compute& compute) {
  if (N == 64)
    compute(std::integral_constant<int64_t, 64>());
  else
    compute(N);
}
// to [kColumns, N] = rows M
__attribute__((noinline)) void rows_times(float* to, const float* rows, const float* M, int64_t N, Fetch& fetch) {
  with_head_size(N, [&](auto n) { multiply({to, nullptr, n, kColumns, n, rows, n, 1, M, n, n}, fetch); });
}
// to [count, kColumns] = M [count, N] times rows^T, which is given as `columns`
__attribute__((noinline)) void times_columns(float* to, const float* M, int64_t count, const float* columns, int64_t N, Fetch& fetch) {
  with_head_size(N, [&](auto n) { multiply({to, nullptr, kColumns, count, kColumns, M, n, 1, columns, kColumns, n}, fetch); });
}
// to [N, N] = (M + x^T y), its rows or its columns scaled
__attribute__((noinline)) void add_outer(float* to, const float* M, const float* x, const float* y, int64_t N, const float* row_scale,
                                         const float* column_scale, Fetch& fetch) {
  with_head_size(N, [&](auto n) { multiply({to, M, n, n, n, x, 1, n, y, n, kColumns, row_scale, column_scale}, fetch); });
}

// The products between the rows of two blocks, [kColumns, kColumns] = rows times columns^T. Token t of the first half of the rows doesn't
// meet token t of either half of the columns.
void between(float* products, const float* rows, const float* columns, int64_t N, Fetch& fetch) {
  times_columns(products, rows, kColumns, columns, N, fetch);
  for (int64_t t = 0; t < kChunk; ++t) products[t * kColumns + t] = products[t * kColumns + kChunk + t] = 0.0f;
}

// Adds to each token's row what other tokens of the chunk give it, rows in x = [first; second]:
//   kEarlier:  out_t += sum_{s<=t} c[t][s] first_s + c[t][kChunk + s] second_s        c: kChunk rows of `products`
//   else       out_t += sum_{s>=t} c[s][t] first_s + c[kChunk + s][t] second_s        c: kChunk columns of it
// kSolve: `out` itself is the second (kEarlier) or the first half of x, final from one token to the next.
template <bool kEarlier, bool kSolve, int V>
inline void add_others_at(int64_t N, int64_t lane, const float* c, const float* x, float* out) {
  Float sum[kChunk][V];
#pragma GCC unroll 8
  for (int64_t t = 0; t < kChunk; ++t)
#pragma GCC unroll 2
    for (int u = 0; u < V; ++u) sum[t][u] = vec::load(out + t * N + lane + u * kLanes);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kChunk; ++i) {
    const int64_t s = kEarlier ? i : kChunk - 1 - i;
#pragma GCC unroll 2
    for (int64_t pass = 0; pass < 2; ++pass) {
      const int64_t half = kEarlier ? pass : 1 - pass;
      Float row[V];
#pragma GCC unroll 2
      for (int u = 0; u < V; ++u) row[u] = kSolve && pass == 1 ? sum[s][u] : vec::load(x + (half * kChunk + s) * N + lane + u * kLanes);
#pragma GCC unroll 8
      for (int64_t j = i; j < kChunk; ++j) {
        const int64_t t = kEarlier ? j : kChunk - 1 - j;
        const Float factor = vec::splat(kEarlier ? c[t * kColumns + half * kChunk + s] : c[(half * kChunk + s) * kColumns + t]);
#pragma GCC unroll 2
        for (int u = 0; u < V; ++u) sum[t][u] += row[u] * factor;
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t t = 0; t < kChunk; ++t)
#pragma GCC unroll 2
    for (int u = 0; u < V; ++u) vec::store(out + t * N + lane + u * kLanes, sum[t][u]);
}
template <bool kEarlier, bool kSolve>
__attribute__((noinline)) void add_others(int64_t N, const float* c, const float* x, float* out) {
  int64_t lane = 0;
  if constexpr (vec::kRegisters == 32)
    for (; N - lane >= 2 * kLanes; lane += 2 * kLanes) add_others_at<kEarlier, kSolve, 2>(N, lane, c, x, out);
  for (; lane < N; lane += kLanes) add_others_at<kEarlier, kSolve, 1>(N, lane, c, x, out);
}

// ---- forward: S is [key, value] -----------------------------------------------------------------------------------------------------

template <class T>
void forward(const Forward& p, const Unit& u) {
  const int64_t N = p.N, half = kChunk * N;
  scratch.reset(N * N + Chunk::floats(N) + 16 * 16 + kColumns * N + kColumns * kColumns);
  float* S = scratch.take(N * N);
  Chunk chunk;
  chunk.take(scratch, N);
  float *columns = scratch.take(kColumns * N), *products = scratch.take(kColumns * kColumns);

  const int64_t state = u.state(p);
  if (p.state)
    small::transpose(p.state + state, N, N, N, S, N);
  else
    std::memset(S, 0, sizeof(float) * N * N);
  auto count = [&](int64_t t) { return t >= u.end ? 0 : u.end - t < kChunk ? u.end - t : kChunk; };
  Fetch fetch;
  for (int64_t t = u.begin; t < u.end; t += kChunk) {
    const int64_t after = t + kChunk;
    read_chunk<T>(chunk, p, u, t, count(t), false);
    fetch = {};
    for (const Rows* rows : {&p.w, &p.r, &p.k, &p.v, &p.a, &p.b})
      fetch.add(token<T>(*rows, u, after), rows->time * sizeof(T), count(after), N * sizeof(T));

    rows_times(chunk.vuy + half, chunk.ar, S, N, fetch);  // [u; y] as far as they come from the state
    small::transpose(chunk.kb, N, kColumns, N, columns, kColumns);
    between(products, chunk.ar, columns, N, fetch);
    add_others<true, true>(N, products, chunk.vuy, chunk.vuy + half);
    add_others<true, false>(N, products + kChunk * kColumns, chunk.vuy, chunk.vuy + 2 * half);
    write(static_cast<T*>(p.y), p, u, t, count(t), chunk.vuy + 2 * half);
    if (p.saved_sa) write(p.saved_sa, p, u, t, count(t), chunk.vuy + half);

    add_outer(S, S, chunk.kb, chunk.vuy, N, chunk.decay(N), nullptr, fetch);
    if (p.saved_state && after < u.end && (after - u.begin) % kSegment == 0)
      small::transpose(S, N, N, N, p.saved_state + u.saved(p, (after - u.begin) / kSegment), N, true);
  }
  small::transpose(S, N, N, N, p.final_state + state, N);
}

// ---- backward: S and G are [value, key] ---------------------------------------------------------------------------------------------

// A chunk's gradients from those of the primed rows, in place: dar = [da; dr], chunk.dkb = [dk; db], and decay ddecay in the place of the
// inverses. g: from before the chunk to after it.
void finish_gradients(const Chunk& chunk, float* dar, float* g, int64_t N, int64_t count) {
  const int64_t half = kChunk * N;
  for (int64_t c = 0; c < N; c += kLanes) {
    Float sum = vec::load(g + c);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * N + c;
      const Float da = vec::load(dar + at), dr = vec::load(dar + half + at);
      const Float dk = vec::load(chunk.dkb + at), db = vec::load(chunk.dkb + half + at);
      const Float decay = vec::load(chunk.decays + at + N), inverse = vec::load(chunk.inverses + at);
      vec::store(dar + at, da * vec::load(chunk.decays + at));
      vec::store(dar + half + at, dr * decay);
      vec::store(chunk.dkb + at, dk * inverse);
      vec::store(chunk.dkb + half + at, db * inverse);
      const Float log_decay = sum - vec::load(chunk.ar + at) * da;
      vec::store(chunk.inverses + at, log_decay);
      sum = log_decay + vec::load(chunk.kb + half + at) * db + vec::load(chunk.kb + at) * dk - vec::load(chunk.ar + half + at) * dr;
    }
    vec::store(g + c, sum);
  }
}
// dw in the place of the slopes; missed: what g was short of, per token of the walk, of which `walked` came before this chunk
void finish_decays(const Chunk& chunk, const float* missed, int64_t walked, int64_t N, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t at = i * N, c = 0; c < N; c += kLanes, at += kLanes) {
      const Float share = vec::load(missed + c) * (static_cast<float>(walked + i) + 0.5f);
      vec::store(chunk.slopes + at, (vec::load(chunk.inverses + at) + share) * vec::load(chunk.slopes + at));
    }
}

template <class T>
void backward(const Backward& p, const Unit& u) {
  const int64_t N = p.N, half = kChunk * N, slots = kChunks + 1;
  scratch.reset(3 * N * N + slots * (Chunk::floats(N) + 16 * 16) + 3 * kColumns * N + kColumns * kColumns + 4 * N);
  float *S = scratch.take(N * N), *G = scratch.take(N * N), *G_halfway = scratch.take(N * N);
  float *columns = scratch.take(kColumns * N), *turned = scratch.take(kColumns * N), *products = scratch.take(kColumns * kColumns);
  float *dar = scratch.take(kColumns * N), *g = scratch.take(N);
  float* g_sums = scratch.take(3 * N);  // at the start of the segment's two walks, and at its end
  Chunk ring[kChunks + 1];
  for (Chunk& chunk : ring) chunk.take(scratch, N);
  // Chunks are numbered from the sequence's start; -1 is what was before.
  auto chunk_of = [&](int64_t number) -> Chunk& { return ring[(number + slots) % slots]; };
  // The gradient of S' at a chunk's end. It is kept where the second walk starts.
  auto G_of = [&](int64_t number) { return number >= 0 && number % kChunks == kWalk - 1 ? G_halfway : G; };
  auto first_token = [&](int64_t number) { return u.begin + number * kChunk; };
  auto count = [&](int64_t number) {
    const int64_t rest = u.end - first_token(number);
    return number < 0 || rest <= 0 ? 0 : rest < kChunk ? rest : kChunk;
  };
  const Rows saved_sa{p.saved_sa, p.T * p.H * N, p.H * N, N};
  auto read_number = [&](int64_t number) {
    Chunk& chunk = chunk_of(number);
    const int64_t t = first_token(number), tokens = count(number);
    read_chunk<T>(chunk, p, u, t, tokens, true);
    for (int64_t i = 0; i < tokens; ++i) {
      read<float>(chunk.vuy + half + i * N, saved_sa, u, t + i, N);
      read<T>(chunk.vddy + 2 * half + i * N, p.dy, u, t + i, N);
    }
    std::memset(chunk.vddy + 2 * half + tokens * N, 0, sizeof(float) * (kChunk - tokens) * N);
  };
  auto write_rows = [&](void* tensor, int64_t number, const float* rows) {
    write(static_cast<T*>(tensor), p, u, first_token(number), count(number), rows);
  };
  // Tokens from .. to - 1 of all inputs
  auto fetch_inputs = [&](Fetch& fetch, int64_t from, int64_t to) {
    for (const Rows* rows : {&p.w, &p.r, &p.k, &p.v, &p.a, &p.b, &p.dy})
      fetch.add(token<T>(*rows, u, from), rows->time * sizeof(T), to - from, N * sizeof(T));
    fetch.add(token<float>(saved_sa, u, from), saved_sa.time * sizeof(float), to - from, N * sizeof(float));
  };

  const int64_t state = u.state(p), chunks = (u.end - u.begin + kChunk - 1) / kChunk;
  const float* dfinal = p.dfinal_state ? p.dfinal_state + state : nullptr;
  Fetch fetch;

  if (chunks > 0) read_number(chunks - 1);
  float* G_end = G_of(chunks - 1);
  for (int64_t i = 0; i < N * N; i += kLanes) {
    const Float last = dfinal ? vec::load(dfinal + i) : Float{};
    vec::store(G_end + i, chunks > 0 ? last * vec::load(chunk_of(chunks - 1).decay(N) + i % N) : last);
  }

  for (int64_t segment = (chunks - 1) / kChunks; segment >= 0 && chunks > 0; --segment) {
    const int64_t begin = segment * kChunks, end = begin + kChunks < chunks ? begin + kChunks : chunks;
    fetch = {};
    if (segment > 0) {  // the segment before, its last chunk first
      fetch_inputs(fetch, first_token(begin - 1), first_token(begin));
      fetch_inputs(fetch, first_token(begin - kChunks), first_token(begin - 1));
    }
    const float* start = segment > 0 ? p.saved_state + u.saved(p, segment) : p.state ? p.state + state : nullptr;
    if (start) fetch.add(start, N * sizeof(float), N, N * sizeof(float));
    // G through the segment's chunks, last to first: dv, D and the parts of dk, db
    for (int64_t number = end - 1; number >= begin; --number) {
      Chunk& chunk = chunk_of(number);
      float *dv = chunk.vddy, *d = dv + half;
      small::transpose(chunk.kb, N, kColumns, N, columns, kColumns);
      times_columns(turned, G_of(number), N, columns, N, fetch);
      small::transpose(turned, kColumns, N, kColumns, dv, N);
      between(products, chunk.ar, columns, N, fetch);
      add_others<false, true>(N, products + kChunk, d, d);
      add_others<false, false>(N, products, d, dv);
      write_rows(p.dv, number, dv);

      small::transpose(chunk.vuy, N, kColumns, N, columns, kColumns);
      between(chunk.products, d, columns, N, fetch);
      rows_times(chunk.dkb, chunk.vuy, G_of(number), N, fetch);
      add_others<false, false>(N, chunk.products, chunk.ar, chunk.dkb);
      add_others<false, false>(N, chunk.products + kChunk, chunk.ar, chunk.dkb + half);

      if (number > 0) read_number(number - 1);
      add_outer(G_of(number - 1), G_of(number), d, chunk.ar, N, nullptr, number > 0 ? chunk_of(number - 1).decay(N) : nullptr, fetch);
    }

    // S through them, first to last: da, dr, g
    if (start == nullptr) std::memset(S, 0, sizeof(float) * N * N);
    const float* from = start ? start : S;  // S before the chunk
    // g before chunk `number`: S' times its gradient is S times G / P_L of the chunk before
    auto sum_g = [&](int64_t number, float* sum) {
      small::sum_of_products(G_of(number - 1), from, N, N, sum);
      if (number > 0)
        for (int64_t c = 0; c < N; ++c) sum[c] *= chunk_of(number - 1).inverse(N)[c];
    };
    if (end < chunks) std::memcpy(g_sums + 2 * N, g_sums, sizeof(float) * N);  // the first of the segment after
    sum_g(begin, g_sums);
    for (int64_t first = begin; first < end; first += kWalk) {
      const int64_t next = first + kWalk < end ? first + kWalk : end;
      const float* after = next < end ? g_sums + N : g_sums + 2 * N;
      std::memcpy(g, first == begin ? g_sums : g_sums + N, sizeof(float) * N);
      for (int64_t number = first; number < next; ++number) {
        const Chunk& chunk = chunk_of(number);
        rows_times(dar, chunk.vddy + half, from, N, fetch);
        add_others<true, false>(N, chunk.products, chunk.kb, dar);
        add_others<true, false>(N, chunk.products + kChunk * kColumns, chunk.kb, dar + half);
        if (number + 1 < end || end == chunks) {
          add_outer(S, from, chunk.vuy, chunk.kb, N, nullptr, chunk.decay(N), fetch);
          from = S;
        }
        if (number + 1 == next && next < end) sum_g(next, g_sums + N);
        finish_gradients(chunk, dar, g, N, count(number));
        write_rows(p.da, number, dar), write_rows(p.dr, number, dar + half);
        write_rows(p.dk, number, chunk.dkb), write_rows(p.db, number, chunk.dkb + half);
      }
      if (next == chunks) {
        if (dfinal)
          small::sum_of_products(dfinal, S, N, N, g_sums + 2 * N);
        else
          std::memset(g_sums + 2 * N, 0, sizeof(float) * N);
      }
      const int64_t tokens = (next - first - 1) * kChunk + count(next - 1);
      for (int64_t c = 0; c < N; ++c) g[c] = (after[c] - g[c]) / static_cast<float>(tokens);
      for (int64_t number = first; number < next; ++number) {
        finish_decays(chunk_of(number), g, (number - first) * kChunk, N, count(number));
        write_rows(p.dw, number, chunk_of(number).slopes);
      }
    }
  }
  if (p.dstate) std::memcpy(p.dstate + state, G_of(-1), sizeof(float) * N * N);
}

}  // namespace

void forward_unit(const Forward& problem, int64_t unit) {
  const vec::FlushDenormals guard;
  const vec::WaitForStreams wait;
  const Unit u(problem, unit);
  switch (problem.dtype) {
    case Dtype::f32: return forward<float>(problem, u);
    case Dtype::bf16: return forward<Bf16>(problem, u);
    case Dtype::f16: return forward<Half>(problem, u);
  }
}

void backward_unit(const Backward& problem, int64_t unit) {
  const vec::FlushDenormals guard;
  const vec::WaitForStreams wait;
  const Unit u(problem, unit);
  switch (problem.dtype) {
    case Dtype::f32: return backward<float>(problem, u);
    case Dtype::bf16: return backward<Bf16>(problem, u);
    case Dtype::f16: return backward<Half>(problem, u);
  }
}

}  // namespace wkv7_cpu
