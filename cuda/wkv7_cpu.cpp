// The exact recurrence of wkv7 on a CPU, fp32 inside, one head of one sequence at a time.
//
// Everything is one kind of pass over an N x N matrix M that stays in the L1 cache, all vectors along one index ("lanes"),
// the other index being the row:
//
//   M = M * decay + x beta^T + z gamma^T;   out1 = M rho;   out2 = M sigma          (sums over the rows: no horizontal sum)
//
//   forward    M = S     lanes = values   out: y_t = S_t r_t                  S_t a_{t+1}
//   backward   M = G     lanes = values   out: dv_t = G_t k_t                 ds_t = G_t b_t              G_t = dL/dS_t,
//              M = G     lanes = keys     out: dk_t = G_t^T v_t               db_t = G_t^T s_t            s_t = S_{t-1} a_t
//              M = S     lanes = keys     out: dr_t = S_t^T dy_t              da_{t+1} = S_t^T ds_{t+1}
//   with  G_t = G_{t+1} diag(decay_{t+1}) + ds_{t+1} a_{t+1}^T + dy_t r_t^T.
//
// The decay's gradient needs no further pass. For column j let g_t = sum_i G_t S_t (elementwise); writing out S_t and G_t:
//   g_t = decay_t ddecay_t + b_t db_t + k_t dk_t   and   decay_t ddecay_t + a_t da_t + r_{t-1} dr_{t-1} = g_{t-1}.
// That is used for one token only; at every other token the sum over G S is made directly, or rounding would pile up.
#include "wkv7_cpu.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#include <torch/headeronly/util/Half.h>

#include "vec.h"

namespace wkv7_cpu {
namespace {

using vec::Float;
using vec::kLanes;

// Vectors in a row of a panel: as many as leave the four accumulators and operands of a pass in registers.
constexpr int kPanelVectors = vec::kRegisters == 32 ? 4 : 2;

constexpr int64_t kAnchor = 2;  // G is kept at every so many tokens, where the decay's gradient starts anew from the matrices
// -log(decay) stays below this
const float kMaxLogDecay = std::exp(-0.5f);

// ---- rows of a [B, T, H, N] tensor in and out -------------------------------------------------------------------------------------

struct Bf16 { uint16_t bits; };
using Half = torch::headeronly::Half;

inline Float load_row(const float* p) { return vec::load(p); }
inline Float load_row(const Bf16* p) { return vec::from_bf16(p); }
inline Float load_row(const Half* p) {
  Float v{};
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}
inline void store_row(float* p, Float v) { vec::store(p, v); }
inline void store_row(Bf16* p, Float v) { vec::to_bf16(p, v); }
inline void store_row(Half* p, Float v) {
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<Half>(static_cast<float>(v[lane]));
}

// ---- memory -----------------------------------------------------------------------------------------------------------------------

// Rows that will be needed soon. A pass asks for a few of their cache lines now and then: asked for all at once they would
// block the processor's own loads.
class Fetch {
 public:
  void to_read(const void* row, int64_t bytes) {
    rows_[count_++] = static_cast<const char*>(row);
    bytes_ = bytes;
    reads_ = count_;
  }
  // Rows to be overwritten; they come after all that are to be read.
  void to_write(const void* row, int64_t bytes) {
    rows_[count_++] = static_cast<const char*>(row);
    bytes_ = bytes;
  }
  int64_t lines() const { return count_ * ((bytes_ + 63) / 64); }
  void some(int64_t lines) {
    for (; lines > 0 && next_ < count_; --lines) {
      if (next_ < reads_)
        __builtin_prefetch(rows_[next_] + offset_, 0, 3);
      else
        __builtin_prefetch(rows_[next_] + offset_, 1, 3);
      offset_ += 64;
      if (offset_ >= bytes_) offset_ = 0, ++next_;
    }
  }

 private:
  const char* rows_[8];
  int64_t count_ = 0, reads_ = 0, next_ = 0, offset_ = 0, bytes_ = 1;
};

// ---- the pass ---------------------------------------------------------------------------------------------------------------------

enum class Decay { by_row, by_lane };

struct Step {
  const float *decay, *x, *beta, *z, *gamma, *rho, *sigma;  // decay, beta, gamma, rho, sigma by row; x, z (and decay by lane) by lane
  float *out1, *out2;                                       // by lane
};

// Sums are closed every so many rows: shorter chains of additions lose less.
constexpr int64_t kSumRows = 32;

template <int V, Decay kDecay>
inline void step_panel(const float* from, float* to, int64_t rows, int64_t lane, const Step& s, Fetch& fetch) {
  Float x[V], z[V], d[V];
#pragma GCC unroll 4
  for (int u = 0; u < V; ++u) {
    x[u] = vec::load(s.x + lane + u * kLanes);
    z[u] = vec::load(s.z + lane + u * kLanes);
    if (kDecay == Decay::by_lane) d[u] = vec::load(s.decay + lane + u * kLanes);
  }
  const float *decay = s.decay, *beta = s.beta, *gamma = s.gamma, *rho = s.rho, *sigma = s.sigma;
  const int64_t lines = (fetch.lines() * 8 + rows - 1) / rows;
  for (int64_t first = 0; first < rows; first += kSumRows) {
    const int64_t last = first + kSumRows < rows ? first + kSumRows : rows;
    Float out1[V] = {}, out2[V] = {};
    for (int64_t block = first; block < last; block += 8) {  // N is a multiple of 16
      fetch.some(lines);
      for (int64_t row = block; row < block + 8; ++row, from += V * kLanes, to += V * kLanes) {
        const Float row_beta = vec::splat(beta[row]), row_gamma = vec::splat(gamma[row]), row_rho = vec::splat(rho[row]),
                    row_sigma = vec::splat(sigma[row]), row_decay = kDecay == Decay::by_row ? vec::splat(decay[row]) : Float{};
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) {
          Float m = vec::load(from + u * kLanes);
          m = kDecay == Decay::by_lane ? m * d[u] : m * row_decay;
          m = z[u] * row_gamma + m;
          m = x[u] * row_beta + m;
          vec::store(to + u * kLanes, m);
          out1[u] = m * row_rho + out1[u];
          out2[u] = m * row_sigma + out2[u];
        }
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) {
      float *to1 = s.out1 + lane + u * kLanes, *to2 = s.out2 + lane + u * kLanes;
      vec::store(to1, first == 0 ? out1[u] : vec::load(to1) + out1[u]);
      vec::store(to2, first == 0 ? out2[u] : vec::load(to2) + out2[u]);
    }
  }
}

// An N x N matrix is stored as panels of up to kPanelVectors vectors of lanes, each panel [rows][its lanes]; a panel's
// lanes never meet another panel's. f<V>(first lane) is called for each.
template <int V, class F>
inline int64_t panels_of_width(int64_t lane, int64_t N, F&& f) {
  for (; N - lane >= V * kLanes; lane += V * kLanes) f(std::integral_constant<int, V>{}, lane);
  return lane;
}
template <class F>
inline void for_panels(int64_t N, F&& f) {
  int64_t lane = 0;
  if constexpr (kPanelVectors >= 4) lane = panels_of_width<4>(lane, N, f);
  lane = panels_of_width<2>(lane, N, f);
  panels_of_width<1>(lane, N, f);
}

// `to` may be `from`.
template <Decay kDecay>
__attribute__((noinline)) void step(const float* from, float* to, int64_t N, const Step& s, Fetch fetch = {}) {
  for_panels(N, [&](auto v, int64_t lane) {
    step_panel<decltype(v)::value, kDecay>(from + lane * N, to + lane * N, N, lane, s, fetch);
  });
}

// The matrices outside are [value][key]; Lanes tells which index runs along our lanes.
enum class Lanes { keys, values };

template <Lanes kWhich, class Copy>
void for_elements(int64_t N, Copy&& copy) {
  for_panels(N, [&](auto v, int64_t lane) {
    constexpr int64_t width = decltype(v)::value * kLanes;
    for (int64_t row = 0; row < N; ++row)
      for (int64_t l = 0; l < width; ++l)
        copy(lane * N + row * width + l, kWhich == Lanes::keys ? row * N + lane + l : (lane + l) * N + row);
  });
}
template <Lanes kWhich>
__attribute__((noinline)) void matrix_in(float* M, const float* outside, int64_t N) {
  if (outside == nullptr)
    std::memset(M, 0, sizeof(float) * N * N);
  else
    for_elements<kWhich>(N, [&](int64_t inner, int64_t outer) { M[inner] = outside[outer]; });
}
template <Lanes kWhich>
__attribute__((noinline)) void matrix_out(float* outside, const float* M, int64_t N) {
  for_elements<kWhich>(N, [&](int64_t inner, int64_t outer) { outside[outer] = M[inner]; });
}

// out = sum over the rows of M * rho
__attribute__((noinline)) void product(const float* M, int64_t N, const float* rho, float* out) {
  for_panels(N, [&](auto v, int64_t lane) {
    constexpr int V = decltype(v)::value;
    Float total[V] = {};
    for (int64_t first = 0; first < N; first += kSumRows) {
      Float sum[V] = {};
      for (int64_t row = first; row < N && row < first + kSumRows; ++row)
        for (int u = 0; u < V; ++u) sum[u] += vec::load(M + lane * N + (row * V + u) * kLanes) * rho[row];
      for (int u = 0; u < V; ++u) total[u] += sum[u];
    }
    for (int u = 0; u < V; ++u) vec::store(out + lane + u * kLanes, total[u]);
  });
}

// out = sum over the rows of A * B, element by element
__attribute__((noinline)) void product_of(const float* A, const float* B, int64_t N, float* out) {
  for_panels(N, [&](auto v, int64_t lane) {
    constexpr int V = decltype(v)::value;
    Float total[V] = {};
    for (int64_t first = 0; first < N; first += kSumRows) {
      Float sum[V] = {};
      for (int64_t row = first; row < N && row < first + kSumRows; ++row)
        for (int u = 0; u < V; ++u) {
          const int64_t at = lane * N + (row * V + u) * kLanes;
          sum[u] += vec::load(A + at) * vec::load(B + at);
        }
      for (int u = 0; u < V; ++u) total[u] += sum[u];
    }
    for (int u = 0; u < V; ++u) vec::store(out + lane + u * kLanes, total[u]);
  });
}

// ---- scratch memory of a thread, kept between calls (fresh pages are dear) -----------------------------------------------------------

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
      std::free(memory_);
      memory_ = static_cast<float*>(std::aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = floats;
    }
    next_ = memory_;
  }
  ~Scratch() { std::free(memory_); }

 private:
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
  for (int64_t c = 0; c < N; c += kLanes) vec::store(to + c, load_row(from + c));
}
template <class T>
inline void write(void* tensor, int64_t row, const float* from, int64_t N) {
  T* to = static_cast<T*>(tensor) + row;
  for (int64_t c = 0; c < N; c += kLanes) store_row(to + c, vec::load(from + c));
}

// decay = exp(-exp(-1/2) sigmoid(w)); slope = d log(decay) / dw
template <class T, bool kSlope>
inline void read_decay(float* decay, float* slope, const Rows& w, const Unit& u, int64_t t, int64_t N) {
  const T* from = token<T>(w, u, t);
  for (int64_t c = 0; c < N; c += kLanes) {
    const Float e = vec::exp(-load_row(from + c));
    const Float sigmoid = 1.0f / (1.0f + e);
    vec::store(decay + c, vec::exp(-kMaxLogDecay * sigmoid));
    if (kSlope) vec::store(slope + c, -kMaxLogDecay * sigmoid * (e * sigmoid));
  }
}

// The rows of a token lie together in scratch, [token][field][N], so that a pass walks through memory in one stream.
enum Field { DECAY, R, K, V, A, B, SA, DY, DS, SLOPE, DR, DW, DK, DV, DA, DB, FIELDS, Y = DY };

struct Tokens {
  float* base;
  int64_t N;
  float* operator()(int64_t token, Field field) const { return base + (token * FIELDS + field) * N; }
};

// Memory is slow and its rows lie far apart: a row is fetched this many tokens before it is read, and written tokens are announced.
constexpr int64_t kAhead = 4;

template <class T>
void forward(const Forward& p, const Unit& u) {
  const int64_t N = p.N, ring = 2 * kAhead;
  scratch.reset(N * N + ring * FIELDS * N);
  float* S = scratch.take(N * N);
  const Tokens all{scratch.take(ring * FIELDS * N), N};
  auto at = [&](int64_t t, Field field) { return all(t % ring, field); };
  auto ahead = [&](int64_t t) {
    Fetch fetch;
    if (t < u.end)
      for (const Rows* rows : {&p.w, &p.r, &p.k, &p.v, &p.a, &p.b}) fetch.to_read(token<T>(*rows, u, t), N * sizeof(T));
    if (t - kAhead < u.end) {
      fetch.to_write(static_cast<T*>(p.y) + u.row(p, t - kAhead), N * sizeof(T));
      if (p.saved_sa) fetch.to_write(p.saved_sa + u.row(p, t - kAhead), N * sizeof(T));
    }
    return fetch;
  };
  auto read_token = [&](int64_t t) {
    if (t >= u.end) return;
    read_decay<T, false>(at(t, DECAY), nullptr, p.w, u, t, N);
    read<T>(at(t, R), p.r, u, t, N);
    read<T>(at(t, K), p.k, u, t, N);
    read<T>(at(t, V), p.v, u, t, N);
    read<T>(at(t, A), p.a, u, t, N);
    read<T>(at(t, B), p.b, u, t, N);
  };

  const int64_t state = u.state(p);
  matrix_in<Lanes::values>(S, p.state ? p.state + state : nullptr, N);
  for (int64_t t = u.begin; t < u.begin + kAhead; ++t) read_token(t);
  if (u.begin < u.end) product(S, N, at(u.begin, A), at(u.begin, SA));
  for (int64_t t = u.begin; t < u.end; ++t) {
    read_token(t + kAhead);
    if (p.saved_state && t > u.begin && (t - u.begin) % kSegment == 0)
      matrix_out<Lanes::values>(p.saved_state + u.saved(p, (t - u.begin) / kSegment), S, N);
    // (After the last token A of the next is whatever lay there, and so is its S a; nobody reads that.)
    step<Decay::by_row>(S, S, N, {at(t, DECAY), at(t, SA), at(t, B), at(t, V), at(t, K), at(t, R), at(t + 1, A), at(t, Y), at(t + 1, SA)},
                         ahead(t + 2 * kAhead));
    write<T>(p.y, u.row(p, t), at(t, Y), N);
    if (p.saved_sa) write<float>(p.saved_sa, u.row(p, t), at(t, SA), N);
  }
  matrix_out<Lanes::values>(p.final_state + state, S, N);
}

template <class T>
void backward(const Backward& p, const Unit& u) {
  const int64_t N = p.N, L = kSegment, anchors = (L + kAnchor - 1) / kAnchor, room = (L + 1) * FIELDS * N;
  scratch.reset((3 + anchors) * N * N + 2 * room);
  float* Gv = scratch.take(N * N);  // G, lanes = values
  float* Gk = scratch.take(N * N);  // G, lanes = keys
  float* S = scratch.take(N * N);   // lanes = keys
  float* kept_G = scratch.take(anchors * N * N);
  // Token i of a segment is t0 + i; token `tokens` is the first one of the segment after.
  Tokens at{scratch.take(room), N}, at_before{scratch.take(room), N};
  const Rows saved_sa{p.saved_sa, p.T * p.H * N, p.H * N, N};
  auto ahead = [&](std::initializer_list<const Rows*> tensors, int64_t t, bool wanted) {
    Fetch fetch;
    if (wanted && t < u.end)
      for (const Rows* rows : tensors) {
        const void* row = rows == &saved_sa ? static_cast<const void*>(token<float>(*rows, u, t)) : token<T>(*rows, u, t);
        fetch.to_read(row, N * sizeof(T));
      }
    return fetch;
  };
  auto read_rwkv = [&](const Tokens& to, int64_t t0, int64_t i) {
    const int64_t t = t0 + i;
    read_decay<T, true>(to(i, DECAY), to(i, SLOPE), p.w, u, t, N);
    read<T>(to(i, R), p.r, u, t, N);
    read<T>(to(i, K), p.k, u, t, N);
    read<T>(to(i, V), p.v, u, t, N);
  };
  auto read_abys = [&](const Tokens& to, int64_t t0, int64_t i) {
    const int64_t t = t0 + i;
    read<T>(to(i, A), p.a, u, t, N);
    read<T>(to(i, B), p.b, u, t, N);
    read<T>(to(i, DY), p.dy, u, t, N);
    read<float>(to(i, SA), saved_sa, u, t, N);
  };

  auto outputs_ahead = [&](int64_t t) {
    Fetch fetch;
    if (t < u.end)
      for (void* out : {p.dr, p.dw, p.dk, p.dv, p.da, p.db}) fetch.to_write(static_cast<T*>(out) + u.row(p, t), N * sizeof(T));
    return fetch;
  };

  const int64_t state = u.state(p);
  const float* dfinal = p.dfinal_state ? p.dfinal_state + state : nullptr;
  matrix_in<Lanes::values>(Gv, dfinal, N);
  matrix_in<Lanes::keys>(Gk, dfinal, N);
  float* newest_Gk = Gk;

  const int64_t segments = (u.end - u.begin + L - 1) / L;
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t t0 = u.begin + segment * L, before = t0 - L;
    const int64_t tokens = u.end - t0 < L ? u.end - t0 : L, tokens_before = segment > 0 ? L : 0;
    if (segment == segments - 1) {
      for (int64_t i = 0; i < tokens; ++i) read_rwkv(at, t0, i), read_abys(at, t0, i);
      // after the last token nothing decays and nothing comes back
      for (int64_t j = 0; j < N; ++j) at(tokens, DECAY)[j] = 1.0f, at(tokens, A)[j] = 0.0f, at(tokens, DS)[j] = 0.0f;
    }

    int64_t have = 0;  // tokens of the segment before that are read meanwhile
    for (int64_t i = tokens - 1; i >= 0; --i) {
      if (have < tokens_before) read_rwkv(at_before, before, have++);
      step<Decay::by_row>(Gv, Gv, N,
                          {at(i + 1, DECAY), at(i + 1, DS), at(i + 1, A), at(i, DY), at(i, R), at(i, K), at(i, B), at(i, DV), at(i, DS)},
                           ahead({&p.w, &p.r, &p.k, &p.v}, before + have + kAhead, have < tokens_before));
    }
    while (have < tokens_before) read_rwkv(at_before, before, have++);
    have = 0;
    for (int64_t i = tokens - 1; i >= 0; --i) {
      if (have < tokens_before) read_abys(at_before, before, have++);
      float* to = i % kAnchor == 0 ? kept_G + i / kAnchor * N * N : Gk;
      step<Decay::by_lane>(newest_Gk, to, N,
                           {at(i + 1, DECAY), at(i + 1, A), at(i + 1, DS), at(i, R), at(i, DY), at(i, V), at(i, SA), at(i, DK), at(i, DB)},
                           ahead({&p.a, &p.b, &p.dy, &saved_sa}, before + have + kAhead, have < tokens_before));
      newest_Gk = to;
    }
    while (have < tokens_before) read_abys(at_before, before, have++);

    const float* start = segment > 0 ? p.saved_state + u.saved(p, segment) : p.state ? p.state + state : nullptr;
    matrix_in<Lanes::keys>(S, start, N);
    product(S, N, at(0, DS), at(0, DA));
    for (int64_t i = 0; i < tokens; ++i) {
      if (i % kAnchor == 0) {
        product_of(kept_G + i / kAnchor * N * N, S, N, at(i, DW));
        for (int64_t j = 0; j < N; ++j) at(i, DW)[j] *= at(i, DECAY)[j];
      }
      step<Decay::by_lane>(S, S, N,
                           {at(i, DECAY), at(i, B), at(i, SA), at(i, K), at(i, V), at(i, DY), at(i + 1, DS), at(i, DR), at(i + 1, DA)},
                           outputs_ahead(t0 + i + kAhead));
      for (int64_t c = 0; c < N; c += kLanes) {
        auto field = [&](int64_t token, Field f) { return vec::load(at(token, f) + c); };
        if ((i + 1) % kAnchor != 0 && i + 1 < tokens) {
          const Float g = field(i, DW) + field(i, B) * field(i, DB) + field(i, K) * field(i, DK);
          vec::store(at(i + 1, DW) + c, g - field(i, R) * field(i, DR) - field(i + 1, A) * field(i + 1, DA));
        }
        vec::store(at(i, DW) + c, field(i, DW) * field(i, SLOPE));
      }
      const int64_t row = u.row(p, t0 + i);
      write<T>(p.dr, row, at(i, DR), N);
      write<T>(p.dw, row, at(i, DW), N);
      write<T>(p.dk, row, at(i, DK), N);
      write<T>(p.dv, row, at(i, DV), N);
      write<T>(p.da, row, at(i, DA), N);
      write<T>(p.db, row, at(i, DB), N);
    }
    if (segment > 0) {
      for (Field carried : {DECAY, A, DS}) std::memcpy(at_before(L, carried), at(0, carried), sizeof(float) * N);
      std::swap(at, at_before);
    }
  }
  if (p.dstate) {
    if (segments > 0) {  // one more update, without a token: dS_0 = G_1 diag(decay_1) + ds_1 a_1^T
      std::memset(at(0, R), 0, sizeof(float) * N);
      step<Decay::by_lane>(newest_Gk, Gk, N,
                           {at(0, DECAY), at(0, A), at(0, DS), at(0, R), at(0, DY), at(0, V), at(0, SA), at(0, DK), at(0, DB)});
    }
    matrix_out<Lanes::keys>(p.dstate + state, Gk, N);
  }
}

}  // namespace

void forward_unit(const Forward& problem, int64_t unit) {
  const vec::FlushDenormals guard;
  const Unit u(problem, unit);
  switch (problem.dtype) {
    case Dtype::f32: return forward<float>(problem, u);
    case Dtype::bf16: return forward<Bf16>(problem, u);
    case Dtype::f16: return forward<Half>(problem, u);
  }
}

void backward_unit(const Backward& problem, int64_t unit) {
  const vec::FlushDenormals guard;
  const Unit u(problem, unit);
  switch (problem.dtype) {
    case Dtype::f32: return backward<float>(problem, u);
    case Dtype::bf16: return backward<Bf16>(problem, u);
    case Dtype::f16: return backward<Half>(problem, u);
  }
}

}  // namespace wkv7_cpu
