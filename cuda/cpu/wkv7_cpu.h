// The native CPU kernel of wkv7 as wkv7.cpp sees it: plain pointers, no PyTorch.
//
//   S_t = S_{t-1} diag(decay_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t,   decay_t = exp(-exp(-1/2) sigmoid(w_t))
#pragma once
#include <cstdint>

namespace wkv7_cpu {

// Tokens between two states that forward keeps for backward. src/ops/recurrence_op.py has the same number for its fake tensors.
constexpr int64_t kSegment = 32;

constexpr float kMaxLogDecay = 0.606530660f;  // exp(-1/2): -log(decay) stays below it

enum class Dtype { f32, bf16, f16 };

// A [B, T, H, N] tensor whose last dimension is dense; strides in elements.
struct Rows {
  const void* data;
  int64_t batch, time, head;
};

struct Problem {
  int64_t B, T, H, N;
  Dtype dtype;
  const int32_t* cu_seqlens;  // [documents + 1] or null
  int64_t documents;          // sequences with a state of their own: B without cu_seqlens
  Rows r, w, k, v, a, b;
  const float* state;  // [documents, H, N, N] or null (zeros)

  int64_t units() const { return documents * H; }
};

// How many states forward keeps (each [H, N, N]): one for every full segment that a later token follows.
inline int64_t saved_states(const Problem& p) {
  return p.cu_seqlens ? p.T / kSegment : p.B * ((p.T - 1) / kSegment);
}

struct Forward : Problem {
  void* y;             // [B, T, H, N], dense
  float* final_state;  // [documents, H, N, N]
  float* saved_state;  // [saved_states, H, N, N] or null: nothing is kept
  float* saved_sa;     // [B, T, H, N] S_{t-1} a_t, or null
};

struct Backward : Problem {
  Rows dy;
  const float* dfinal_state;  // or null (zeros)
  const float* saved_state;
  const float* saved_sa;
  void *dr, *dw, *dk, *dv, *da, *db;  // [B, T, H, N], dense
  float* dstate;                      // [documents, H, N, N] or null
};

// One unit is one head of one sequence; units are independent, any thread may run any of them.
void forward_unit(const Forward& problem, int64_t unit);
void backward_unit(const Backward& problem, int64_t unit);

}  // namespace wkv7_cpu
