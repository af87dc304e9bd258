// The cross-entropy ops and their CPU implementation (schemas: cross_entropy.h). Rows of logits are fp32, dense.
//
//   forward:   nll = log(total) - (z[target] - largest),   total = sum of exp(z - largest)
//   backward:  z becomes  scale (exp(z - largest) / total - onehot(target))  and  + scale l2wrap largest  where z is largest
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "../cross_entropy.h"
#include "vec.h"

namespace cross_entropy_cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vec::Float;
using vec::kLanes;

struct Largest {
  float value;
  int64_t where;
};

inline float number(const float* p) { return *p; }
inline float number(const vec::Bf16* p) {
  const uint32_t bits = uint32_t{p->bits} << 16;
  return vec::load_as<float>(&bits);
}
inline void set(float* p, float x) { *p = x; }
inline void set(vec::Bf16* p, float x) {
  vec::Bf16 rounded[kLanes];
  vec::store(rounded, vec::splat(x));
  *p = rounded[0];
}
inline float exp(float x) { return vec::exp(vec::splat(x))[0]; }

// The largest number and its first index. A NaN is passed over here; the sum of exponentials brings it out.
template <class T>
Largest largest_of(const T* z, int64_t V) {
  constexpr int64_t kPart = 512;  // numbers: only in the part that has the largest is its index searched
  // Not std::fmax: g++ 12 for ARM fails on a loop of it (internal compiler error in its vectoriser).
  const auto larger = [](float a, float b) { return b > a ? b : a; };
  float value = -INFINITY;
  int64_t part = 0;
  for (int64_t begin = 0; begin < V; begin += kPart) {
    const int64_t end = begin + kPart < V ? begin + kPart : V;
    Float best[4] = {vec::splat(-INFINITY), vec::splat(-INFINITY), vec::splat(-INFINITY), vec::splat(-INFINITY)};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Float x = vec::load(z + i + u * kLanes);
        best[u] = x > best[u] ? x : best[u];
      }
    float largest = -INFINITY;
    for (; i < end; ++i) largest = larger(largest, number(z + i));
    best[0] = best[1] > best[0] ? best[1] : best[0];
    best[2] = best[3] > best[2] ? best[3] : best[2];
    best[0] = best[2] > best[0] ? best[2] : best[0];
    for (int lane = 0; lane < kLanes; ++lane) largest = larger(largest, best[0][lane]);
    if (largest > value) value = largest, part = begin;
  }
  int64_t where = part;
  while (where < V && number(z + where) != value) ++where;
  return {value, where < V ? where : 0};
}

template <class T>
float sum_of_exponentials(const T* z, int64_t V, float largest) {
  Float sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= V; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sum[u] += vec::exp(vec::load(z + i + u * kLanes) - largest);
  float total = vec::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < V; ++i) total += exp(number(z + i) - largest);
  return total;
}

void check(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) >= 1 &&
                      (logits.scalar_type() == ScalarType::Float || logits.scalar_type() == ScalarType::BFloat16),
                  "cross_entropy_l2wrap: on a CPU logits must be float32 or bfloat16 [rows, V], dense");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
                      targets.size(0) == logits.size(0),
                  "cross_entropy_l2wrap: targets must be int64 [rows], dense");
}

const float* row_values(const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() == rows,
                  "cross_entropy_l2wrap: what belongs to the rows must be float32 [rows], dense");
  return static_cast<const float*>(x.const_data_ptr());
}

// Calls f with a row's pointer type, as the logits are stored.
template <class F>
void by_dtype(const Tensor& logits, const F& f) {
  if (logits.scalar_type() == ScalarType::Float)
    f(static_cast<float*>(logits.mutable_data_ptr()));
  else
    f(static_cast<vec::Bf16*>(logits.mutable_data_ptr()));
}

constexpr int64_t kGrain = 8;  // rows

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor targets, int64_t ignore_index) {
  check(logits, targets);
  const int64_t rows = logits.size(0), V = logits.size(1);
  auto floats = [&] { return torch::stable::new_empty(logits, {rows}, ScalarType::Float); };
  const Tensor nll = floats(), largest = floats(), total = floats(), where = torch::stable::new_empty(targets, {rows});
  const auto* target = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(target[row] == ignore_index || (target[row] >= 0 && target[row] < V), "cross_entropy_l2wrap: target ", target[row],
                    " is not below the vocabulary's size ", V);
  auto* to_nll = static_cast<float*>(nll.mutable_data_ptr());
  auto* to_largest = static_cast<float*>(largest.mutable_data_ptr());
  auto* to_total = static_cast<float*>(total.mutable_data_ptr());
  auto* to_where = static_cast<int64_t*>(where.mutable_data_ptr());
  by_dtype(logits, [&](auto* z) {
    torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      const vec::FlushDenormals guard;  // the exponentials of logits far below the largest
      for (int64_t row = begin; row < end; ++row) {
        if (target[row] == ignore_index) {  // its logits are not read: they need not be finite
          to_nll[row] = to_largest[row] = 0.0f, to_total[row] = 1.0f, to_where[row] = 0;
          continue;
        }
        const auto* p = z + row * V;
        const Largest found = largest_of(p, V);
        to_largest[row] = found.value, to_where[row] = found.where;
        to_total[row] = sum_of_exponentials(p, V, found.value);
        // The target's logit is taken from z, as its exponential may have underflowed.
        to_nll[row] = std::log(to_total[row]) - (number(p + target[row]) - found.value);
      }
    });
  });
  return {nll, largest, total, where};
}

void backward(Tensor logits, Tensor targets, Tensor largest, Tensor total, Tensor where, Tensor scale, double l2wrap) {
  check(logits, targets), check(logits, where);
  const int64_t rows = logits.size(0), V = logits.size(1);
  const auto* target = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto* at_largest = static_cast<const int64_t*>(where.const_data_ptr());
  const float *top = row_values(largest, rows), *sum = row_values(total, rows), *factor = row_values(scale, rows);
  by_dtype(logits, [&](auto* z) {
    torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      const vec::FlushDenormals guard;  // the exponentials of logits far below the largest
      for (int64_t row = begin; row < end; ++row) {
        auto* p = z + row * V;
        if (factor[row] == 0.0f) {
          std::memset(p, 0, V * sizeof(*p));
          continue;
        }
        const float share = factor[row] / sum[row];
        const int64_t wanted = target[row], first = at_largest[row];
        const bool counts = wanted >= 0 && wanted < V;
        float at_target = counts ? exp(number(p + wanted) - top[row]) * share - factor[row] : 0.0f;
        const float wrap = factor[row] * static_cast<float>(l2wrap) * top[row], at_first = share + wrap;
        if (wanted == first) at_target += wrap;
        int64_t i = 0;
        for (; i + kLanes <= V; i += kLanes) vec::store(p + i, vec::exp(vec::load(p + i) - top[row]) * share);
        for (; i < V; ++i) set(p + i, exp(number(p + i) - top[row]) * share);
        set(p + first, at_first);
        if (counts) set(p + wanted, at_target);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def(kCrossEntropyForward);
  m.def(kCrossEntropyBackward);
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("cross_entropy_l2wrap_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_l2wrap_backward_", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace cross_entropy_cpu
