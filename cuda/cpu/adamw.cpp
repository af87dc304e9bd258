// AdamW for bf16 weights with fp32 masters on a CPU: one pass over memory for the gradient's norm, one for the step.
//
//   g = gradient / scale;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   master = master (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps);   weight = master, rounded
#include <cmath>
#include <vector>

#include "dense.h"

namespace adamw {
namespace {

using dense::data;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vec::Bf16;
using vec::Float;
using vec::kLanes;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("sum_of_squares(Tensor x) -> Tensor");
  m.def(
      "adamw_step_(Tensor(a!) weight, Tensor gradient, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, float lr, float beta1, float beta2,"
      " float eps, float weight_decay, float step, float scale) -> ()");
}

constexpr int64_t kSlice = 1 << 15;  // numbers; a multiple of kLanes

// Calls run(i, lanes) for each vector of begin .. end - 1; only the last may have fewer lanes than kLanes.
template <class F>
void each_vector(int64_t begin, int64_t end, const F& run) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) run(i, kLanes);
  if (i < end) run(i, end - i);
}
template <class T>
Float load_some(const T* p, int64_t lanes) {
  if (lanes == kLanes) return vec::load(p);
  T some[kLanes] = {};
  std::memcpy(some, p, lanes * sizeof(T));
  return vec::load(some);
}
template <class T>
void store_some(T* p, Float v, int64_t lanes) {
  if (lanes == kLanes) return vec::store(p, v);
  T some[kLanes];
  vec::store(some, v);
  std::memcpy(p, some, lanes * sizeof(T));
}

// fp32 []. A slice's sum is fp32 in each lane, theirs are added up in double and in their order: the same bits on any number of threads.
Tensor sum_of_squares(Tensor x_in) {
  const Tensor x = dense::tensor<Bf16>("sum_of_squares", x_in, x_in.numel()), out = torch::stable::new_empty(x, {}, ScalarType::Float);
  const int64_t numel = x.numel(), slices = (numel + kSlice - 1) / kSlice;
  const Bf16* from = data<const Bf16>(x);
  std::vector<double> sums(slices);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      Float sum[4] = {};
      each_vector(slice * kSlice, std::min(numel, (slice + 1) * kSlice), [&](int64_t i, int64_t lanes) {
        const Float v = load_some(from + i, lanes);
        sum[i / kLanes % 4] += v * v;
      });
      sums[slice] = vec::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *data<float>(out) = static_cast<float>(total);
  return out;
}

void step(Tensor weight, Tensor gradient, Tensor master, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1, double beta2, double eps,
          double weight_decay, double step, double scale) {
  const int64_t numel = weight.numel();
  for (const Tensor* x : {&master, &exp_avg, &exp_avg_sq})
    STD_TORCH_CHECK(x->is_contiguous() && x->numel() == numel && x->scalar_type() == ScalarType::Float, "adamw_step_: masters and moments must be ",
                    "float32, dense, of the weight's size");
  STD_TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == ScalarType::BFloat16, "adamw_step_: the weight must be bfloat16, dense");
  const Tensor held = dense::tensor<Bf16>("adamw_step_", gradient, numel);
  const Bf16* from = data<const Bf16>(held);
  Bf16* const to = data<Bf16>(weight);
  float *const w = data<float>(master), *const m = data<float>(exp_avg), *const v = data<float>(exp_avg_sq);
  const float unscale = static_cast<float>(1.0 / scale), keep = static_cast<float>(1.0 - lr * weight_decay), slow = static_cast<float>(eps);
  const float step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step))), root = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)));
  const float new1 = static_cast<float>(1.0 - beta1), old2 = static_cast<float>(beta2), new2 = static_cast<float>(1.0 - beta2);
  torch::stable::parallel_for(0, (numel + kLanes - 1) / kLanes, kSlice / kLanes, [&](int64_t first, int64_t last) {
    const vec::FlushDenormals guard;  // the moments of a weight that gets no gradients any more
    each_vector(first * kLanes, std::min(numel, last * kLanes), [&](int64_t i, int64_t lanes) {
      const Float g = load_some(from + i, lanes) * unscale;
      Float average = load_some(m + i, lanes);
      average += (g - average) * new1;
      const Float square = load_some(v + i, lanes) * old2 + g * g * new2;
      const Float now = load_some(w + i, lanes) * keep - average * step_size / (vec::sqrt(square) / root + slow);
      store_some(m + i, average, lanes);
      store_some(v + i, square, lanes);
      store_some(w + i, now, lanes);
      store_some(to + i, now, lanes);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
  m.impl("adamw_step_", TORCH_BOX(&step));
}

}  // namespace
}  // namespace adamw
