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
// It starts anew from the matrices at every segment, so rounding can't pile up over long sequences.
#include "wkv7_cpu.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include <torch/headeronly/util/Half.h>

#include "vec.h"

namespace wkv7_cpu {
namespace {

using vec::Float;
using vec::kLanes;

// Vectors in a row of a panel: as many as leave the four accumulators and operands of a pass in registers.
constexpr int kPanelVectors = vec::kRegisters == 32 ? 4 : 2;

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

// ---- the pass ---------------------------------------------------------------------------------------------------------------------

enum class Decay { by_row, by_lane };

struct Step {
  const float *decay, *x, *beta, *z, *gamma, *rho, *sigma;  // decay, beta, gamma, rho, sigma by row; x, z (and decay by lane) by lane
  float *out1, *out2;                                       // by lane
};

template <int V, Decay kDecay>
inline void step_panel(float* __restrict M, int64_t rows, int64_t lane, const Step& s) {
  Float x[V], z[V], d[V], out1[V], out2[V];
#pragma GCC unroll 4
  for (int u = 0; u < V; ++u) {
    x[u] = vec::load(s.x + lane + u * kLanes);
    z[u] = vec::load(s.z + lane + u * kLanes);
    if (kDecay == Decay::by_lane) d[u] = vec::load(s.decay + lane + u * kLanes);
    out1[u] = out2[u] = Float{};
  }
  const float *decay = s.decay, *beta = s.beta, *gamma = s.gamma, *rho = s.rho, *sigma = s.sigma;
  for (int64_t row = 0; row < rows; ++row, M += V * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) {
      Float m = vec::load(M + u * kLanes);
      m = kDecay == Decay::by_lane ? m * d[u] : m * decay[row];
      m = z[u] * gamma[row] + m;
      m = x[u] * beta[row] + m;
      vec::store(M + u * kLanes, m);
      out1[u] = m * rho[row] + out1[u];
      out2[u] = m * sigma[row] + out2[u];
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < V; ++u) {
    vec::store(s.out1 + lane + u * kLanes, out1[u]);
    vec::store(s.out2 + lane + u * kLanes, out2[u]);
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

template <Decay kDecay>
__attribute__((noinline)) void step(float* M, int64_t N, const Step& s) {
  for_panels(N, [&](auto v, int64_t lane) { step_panel<decltype(v)::value, kDecay>(M + lane * N, N, lane, s); });
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
    Float sum[V] = {};
    for (int64_t row = 0; row < N; ++row)
      for (int u = 0; u < V; ++u) sum[u] += vec::load(M + lane * N + (row * V + u) * kLanes) * rho[row];
    for (int u = 0; u < V; ++u) vec::store(out + lane + u * kLanes, sum[u]);
  });
}

// out = sum over the rows of A * B, element by element
__attribute__((noinline)) void product_of(const float* A, const float* B, int64_t N, float* out) {
  for_panels(N, [&](auto v, int64_t lane) {
    constexpr int V = decltype(v)::value;
    Float sum[V] = {};
    for (int64_t row = 0; row < N; ++row)
      for (int u = 0; u < V; ++u) {
        const int64_t at = lane * N + (row * V + u) * kLanes;
        sum[u] += vec::load(A + at) * vec::load(B + at);
      }
    for (int u = 0; u < V; ++u) vec::store(out + lane + u * kLanes, sum[u]);
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
inline const T* at(const Rows& rows, const Unit& u, int64_t t) {
  return static_cast<const T*>(rows.data) + u.batch * rows.batch + t * rows.time + u.head * rows.head;
}

template <class T>
inline void read(float* to, const Rows& rows, const Unit& u, int64_t t, int64_t N) {
  const T* from = at<T>(rows, u, t);
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
  const T* from = at<T>(w, u, t);
  for (int64_t c = 0; c < N; c += kLanes) {
    const Float e = vec::exp(-load_row(from + c));
    const Float sigmoid = 1.0f / (1.0f + e);
    vec::store(decay + c, vec::exp(-kMaxLogDecay * sigmoid));
    if (kSlope) vec::store(slope + c, -kMaxLogDecay * sigmoid * (e * sigmoid));
  }
}

template <class T>
void forward(const Forward& p, const Unit& u) {
  const int64_t N = p.N, L = kSegment;
  scratch.reset(N * N + 8 * (L + 1) * N);
  float* S = scratch.take(N * N);
  float* decay = scratch.take((L + 1) * N);
  float* r = scratch.take((L + 1) * N);
  float* k = scratch.take((L + 1) * N);
  float* v = scratch.take((L + 1) * N);
  float* a = scratch.take((L + 1) * N);
  float* b = scratch.take((L + 1) * N);
  float* y = scratch.take((L + 1) * N);
  float* sa = scratch.take((L + 1) * N);

  const int64_t state = u.state(p);
  matrix_in<Lanes::values>(S, p.state ? p.state + state : nullptr, N);
  for (int64_t t0 = u.begin; t0 < u.end; t0 += L) {
    const int64_t tokens = u.end - t0 < L ? u.end - t0 : L;
    for (int64_t i = 0; i < tokens; ++i) {
      read_decay<T, false>(decay + i * N, nullptr, p.w, u, t0 + i, N);
      read<T>(r + i * N, p.r, u, t0 + i, N);
      read<T>(k + i * N, p.k, u, t0 + i, N);
      read<T>(v + i * N, p.v, u, t0 + i, N);
      read<T>(a + i * N, p.a, u, t0 + i, N);
      read<T>(b + i * N, p.b, u, t0 + i, N);
    }
    std::memset(a + tokens * N, 0, sizeof(float) * N);  // S a of the next segment's first token is its own business
    if (p.saved_state && t0 > u.begin) matrix_out<Lanes::values>(p.saved_state + u.saved(p, (t0 - u.begin) / L), S, N);
    product(S, N, a, sa);
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t o = i * N;
      step<Decay::by_row>(S, N, {decay + o, sa + o, b + o, v + o, k + o, r + o, a + o + N, y + o, sa + o + N});
    }
    for (int64_t i = 0; i < tokens; ++i) {
      write<T>(p.y, u.row(p, t0 + i), y + i * N, N);
      if (p.saved_sa) write<float>(p.saved_sa, u.row(p, t0 + i), sa + i * N, N);
    }
  }
  matrix_out<Lanes::values>(p.final_state + state, S, N);
}

template <class T>
void backward(const Backward& p, const Unit& u) {
  const int64_t N = p.N, L = kSegment, rows = (L + 1) * N;
  scratch.reset(3 * N * N + 16 * rows);
  float* Gv = scratch.take(N * N);  // dL/dS, lanes = values
  float* Gk = scratch.take(N * N);  // the same, lanes = keys
  float* S = scratch.take(N * N);   // lanes = keys
  // Row i of these is token t0 + i; row `tokens` of decay, a and ds is the first token of the segment after.
  float *decay = scratch.take(rows), *slope = scratch.take(rows), *r = scratch.take(rows), *k = scratch.take(rows),
        *v = scratch.take(rows), *a = scratch.take(rows), *b = scratch.take(rows), *sa = scratch.take(rows),
        *dy = scratch.take(rows), *ds = scratch.take(rows), *dr = scratch.take(rows), *dw = scratch.take(rows),
        *dk = scratch.take(rows), *dv = scratch.take(rows), *da = scratch.take(rows), *db = scratch.take(rows);

  const int64_t state = u.state(p);
  const float* dfinal = p.dfinal_state ? p.dfinal_state + state : nullptr;
  matrix_in<Lanes::values>(Gv, dfinal, N);
  matrix_in<Lanes::keys>(Gk, dfinal, N);
  const Rows saved_sa{p.saved_sa, p.T * p.H * N, p.H * N, N};

  const int64_t segments = (u.end - u.begin + L - 1) / L;
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t t0 = u.begin + segment * L;
    const int64_t tokens = u.end - t0 < L ? u.end - t0 : L;
    if (segment == segments - 1) {  // after the last token nothing decays and nothing comes back
      for (int64_t j = 0; j < N; ++j) decay[tokens * N + j] = 1.0f, a[tokens * N + j] = 0.0f, ds[tokens * N + j] = 0.0f;
    } else {
      for (float* carried : {decay, a, ds}) std::memcpy(carried + tokens * N, carried, sizeof(float) * N);
    }
    for (int64_t i = 0; i < tokens; ++i) {
      read_decay<T, true>(decay + i * N, slope + i * N, p.w, u, t0 + i, N);
      read<T>(r + i * N, p.r, u, t0 + i, N);
      read<T>(k + i * N, p.k, u, t0 + i, N);
      read<T>(v + i * N, p.v, u, t0 + i, N);
      read<T>(a + i * N, p.a, u, t0 + i, N);
      read<T>(b + i * N, p.b, u, t0 + i, N);
      read<T>(dy + i * N, p.dy, u, t0 + i, N);
      read<float>(sa + i * N, saved_sa, u, t0 + i, N);
    }

    for (int64_t i = tokens - 1; i >= 0; --i) {
      const int64_t o = i * N, next = o + N;
      step<Decay::by_row>(Gv, N, {decay + next, ds + next, a + next, dy + o, r + o, k + o, b + o, dv + o, ds + o});
    }
    for (int64_t i = tokens - 1; i >= 0; --i) {
      const int64_t o = i * N, next = o + N;
      step<Decay::by_lane>(Gk, N, {decay + next, a + next, ds + next, r + o, dy + o, v + o, sa + o, dk + o, db + o});
    }

    const float* start = segment > 0 ? p.saved_state + u.saved(p, segment) : p.state ? p.state + state : nullptr;
    matrix_in<Lanes::keys>(S, start, N);
    product(S, N, ds, da);
    product_of(Gk, S, N, dw);  // ddecay of the first token, directly
    for (int64_t j = 0; j < N; ++j) dw[j] *= decay[j];
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t o = i * N, next = o + N;
      step<Decay::by_lane>(S, N, {decay + o, b + o, sa + o, k + o, v + o, dy + o, ds + next, dr + o, da + next});
    }
    for (int64_t i = 0; i < tokens; ++i) {
      float* here = dw + i * N;
      for (int64_t c = i * N; c < (i + 1) * N; c += kLanes) {
        const Float log_gradient = vec::load(dw + c);
        if (i + 1 < tokens) {
          Float g = log_gradient + vec::load(b + c) * vec::load(db + c) + vec::load(k + c) * vec::load(dk + c);
          g -= vec::load(r + c) * vec::load(dr + c) + vec::load(a + c + N) * vec::load(da + c + N);
          vec::store(dw + c + N, g);
        }
        vec::store(dw + c, log_gradient * vec::load(slope + c));
      }
      const int64_t row = u.row(p, t0 + i);
      write<T>(p.dr, row, dr + i * N, N);
      write<T>(p.dw, row, here, N);
      write<T>(p.dk, row, dk + i * N, N);
      write<T>(p.dv, row, dv + i * N, N);
      write<T>(p.da, row, da + i * N, N);
      write<T>(p.db, row, db + i * N, N);
    }
  }
  if (p.dstate) {
    if (segments > 0) {  // one more update, without a token: dS_0 = G_1 diag(decay_1) + ds_1 a_1^T
      std::memset(r, 0, sizeof(float) * N);
      step<Decay::by_lane>(Gk, N, {decay, a, ds, r, dy, v, sa, dk, db});
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
