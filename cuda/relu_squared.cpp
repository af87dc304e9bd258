// relu(x)^2 and its gradient 2 relu(x) dy on a CPU, each in one pass over memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "vec.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vec::Float;
using vec::kLanes;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("relu_squared(Tensor x) -> Tensor");
  m.def("relu_squared_backward(Tensor dy, Tensor x) -> Tensor");
}

inline Float positive(Float x) { return x < 0.0f ? Float{} : x; }  // keeps NaN

// out[i] = f(a[i], b[i]) for fp32 tensors of one size, dense in memory.
template <class F>
Tensor elementwise(const Tensor& a_in, const Tensor& b_in, const F& f) {
  STD_TORCH_CHECK(a_in.scalar_type() == ScalarType::Float && b_in.scalar_type() == ScalarType::Float, "relu_squared: needs float32");
  STD_TORCH_CHECK(a_in.numel() == b_in.numel(), "relu_squared: dy must have the shape of x");
  const Tensor a = torch::stable::contiguous(a_in), b = torch::stable::contiguous(b_in);
  const Tensor out = torch::stable::new_empty(b, b.sizes());
  const auto* pa = static_cast<const float*>(a.const_data_ptr());
  const auto* pb = static_cast<const float*>(b.const_data_ptr());
  auto* po = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, a.numel(), 32768, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) vec::store(po + i, f(vec::load(pa + i), vec::load(pb + i)));
    for (; i < end; ++i) po[i] = f(vec::splat(pa[i]), vec::splat(pb[i]))[0];
  });
  return out;
}

Tensor forward(Tensor x) {
  return elementwise(x, x, [](Float x, Float) { return positive(x) * positive(x); });
}
Tensor backward(Tensor dy, Tensor x) {
  return elementwise(dy, x, [](Float dy, Float x) { return 2.0f * positive(x) * dy; });
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("relu_squared", TORCH_BOX(&forward));
  m.impl("relu_squared_backward", TORCH_BOX(&backward));
}

}  // namespace
