// AdamW with decoupled decay, in one pass over memory: with g = gradient / grad_scale, t the number of this step,
//
//   m <- beta1 m + (1 - beta1) g      v <- beta2 v + (1 - beta2) g^2
//   master <- master (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)      parameter <- master, rounded
//
// Per parameter of 16 bits: 2 bytes of gradient and 12 of master and moments read, 12 and 2 of the parameter written: 28. Where found_inf is not 0
// nothing is changed. One launch serves up to kMost tensors, whose addresses are arguments of the kernel.
#include "row_tiles.cuh"

namespace {

constexpr int kThreads = 256, kVectors = 4;            // accesses of a thread, of kVector elements each
constexpr int kBlock = kThreads * kVector * kVectors;  // elements of a block
constexpr int kMost = 56;                              // tensors of a launch: a kernel's arguments have 4 KB

struct One {
  void* parameter;  // null: the master is the parameter
  const void* gradient;
  float *master, *exp_avg, *exp_avg_sq;
  int64_t numel;
};

struct Step {
  One tensor[kMost];
  int first_block[kMost + 1];
  int tensors;
  const float *steps, *lr, *grad_scale, *found_inf;
  float beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay;  // rest: 1 - beta
};

// What all elements of a step share.
struct Factors {
  float scale, keep, rate, inverse_root;  // of gradients; of masters: 1 - lr decay; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t)

  DEVICE explicit Factors(const Step& p) {
    const float t = *p.steps + 1.0f, lr = *p.lr;
    scale = 1.0f / *p.grad_scale;
    keep = 1.0f - lr * p.weight_decay;
    // 1 - beta^t by expm1: nothing cancels in the first steps
    rate = lr / -exact_expm1(t * p.log_beta1);
    inverse_root = 1.0f / square_root(-exact_expm1(t * p.log_beta2));
  }
};

DEVICE void update(const Step& p, const Factors& f, float gradient, float& master, float& m, float& v) {
  const float g = gradient * f.scale;
  m = p.beta1 * m + p.rest1 * g;
  v = p.beta2 * v + p.rest2 * g * g;
  master = master * f.keep - f.rate * m / (square_root(v) * f.inverse_root + p.eps);
}

DEVICE bool is_multiple(const void* at, int bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

template <class T>
__global__ void __launch_bounds__(kThreads) adamw(Step p) {
  if (*p.found_inf != 0.0f) return;
  const int block = int(blockIdx.x);
  int low = 0, high = p.tensors;  // the tensor of this block: the last whose first block isn't after it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.first_block[middle] <= block) low = middle;
    else high = middle;
  }
  const One& x = p.tensor[low];
  T* const parameter = static_cast<T*>(x.parameter);
  const T* const gradient = static_cast<const T*>(x.gradient);
  const Factors factors(p);
  const int64_t begin = int64_t(block - p.first_block[low]) * kBlock, end = begin + kBlock < x.numel ? begin + kBlock : x.numel;
  // tensors of a larger buffer start anywhere
  const bool aligned = is_multiple(x.master, 16) && is_multiple(x.exp_avg, 16) && is_multiple(x.exp_avg_sq, 16) &&
                       is_multiple(gradient, kVector * sizeof(T)) && is_multiple(parameter, kVector * sizeof(T));
  const int64_t vectors_end = aligned ? begin + (end - begin) / kVector * kVector : begin;
#pragma unroll 2
  for (int i = 0; i < kVectors; i++) {
    const int64_t at = begin + (int64_t(i) * kThreads + threadIdx.x) * kVector;
    if (at >= vectors_end) break;
    float g[kVector], master[kVector], m[kVector], v[kVector];
    load_vector<T>(g, gradient, at);
    load_floats(master, x.master + at);
    load_floats(m, x.exp_avg + at);
    load_floats(v, x.exp_avg_sq + at);
#pragma unroll
    for (int c = 0; c < kVector; c++) update(p, factors, g[c], master[c], m[c], v[c]);
    store_floats(x.master + at, master);
    store_floats(x.exp_avg + at, m);
    store_floats(x.exp_avg_sq + at, v);
    if constexpr (sizeof(T) == 2) store_vector<T>(parameter, at, master);
  }
  for (int64_t at = vectors_end + threadIdx.x; at < end; at += kThreads) {
    float master = x.master[at], m = x.exp_avg[at], v = x.exp_avg_sq[at];
    update(p, factors, to_float(gradient[at]), master, m, v);
    x.master[at] = master, x.exp_avg[at] = m, x.exp_avg_sq[at] = v;
    if constexpr (sizeof(T) == 2) parameter[at] = from_float<T>(master);
  }
}

}  // namespace

extern "C" {

// Returns 0, a CUDA error number, or -1 for another dtype (0: fp32, 1: bf16, 2: fp16). All pointers are to the current device; of fp32 parameters
// only masters are used.
int adamw_step(int dtype, int tensors, void* const* parameters, const void* const* gradients, float* const* masters, float* const* exp_avgs,
               float* const* exp_avg_sqs, const int64_t* numels, const float* steps, const float* lr, const float* grad_scale,
               const float* found_inf, double beta1, double beta2, double log_beta1, double log_beta2, double eps, double weight_decay,
               int64_t stream) {
  Step p{};
  p.steps = steps, p.lr = lr, p.grad_scale = grad_scale, p.found_inf = found_inf;
  p.beta1 = float(beta1), p.beta2 = float(beta2), p.rest1 = float(1.0 - beta1), p.rest2 = float(1.0 - beta2);
  p.log_beta1 = float(log_beta1), p.log_beta2 = float(log_beta2), p.eps = float(eps), p.weight_decay = float(weight_decay);
  for (int i = 0; i < tensors; i++) {
    p.tensor[p.tensors] = {dtype == 0 ? nullptr : parameters[i], gradients[i], masters[i], exp_avgs[i], exp_avg_sqs[i], numels[i]};
    p.first_block[p.tensors + 1] = p.first_block[p.tensors] + int((numels[i] + kBlock - 1) / kBlock);
    p.tensors++;
    if (p.tensors < kMost && i + 1 < tensors) continue;
    const unsigned blocks = unsigned(p.first_block[p.tensors]);
    int code = kNoSuchKernel;
    if (blocks == 0) code = 0;
    else if (dtype == 0) code = launch(adamw<float>, blocks, kThreads, 0, stream, p);
    else if (dtype == 1) code = launch(adamw<bf16>, blocks, kThreads, 0, stream, p);
    else if (dtype == 2) code = launch(adamw<fp16>, blocks, kThreads, 0, stream, p);
    if (code) return code;
    p.tensors = 0;
  }
  return 0;
}
}
