// relu(x)^2 and its gradient 2 relu(x) dy on a CPU, each in one pass over memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

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

// out[i] = f(a[i], b[i]) for tensors of one size, dense in memory.
template <class T, class F>
void elementwise(const Tensor& a, const Tensor& b, const Tensor& out, const F& f) {
  const auto* pa = static_cast<const T*>(a.const_data_ptr());
  const auto* pb = static_cast<const T*>(b.const_data_ptr());
  auto* po = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, a.numel(), 32768, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) vec::store(po + i, f(vec::load(pa + i), vec::load(pb + i)));
    if (i < end) {
      T rest_a[kLanes] = {}, rest_b[kLanes] = {}, rest[kLanes];
      std::memcpy(rest_a, pa + i, (end - i) * sizeof(T));
      std::memcpy(rest_b, pb + i, (end - i) * sizeof(T));
      vec::store(rest, f(vec::load(rest_a), vec::load(rest_b)));
      std::memcpy(po + i, rest, (end - i) * sizeof(T));
    }
  });
}

template <class F>
Tensor dispatch(const Tensor& a_in, const Tensor& b_in, const F& f) {
  const auto dtype = a_in.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && b_in.scalar_type() == dtype,
                  "relu_squared: needs float32 or bfloat16");
  STD_TORCH_CHECK(a_in.numel() == b_in.numel(), "relu_squared: dy must have the shape of x");
  const Tensor a = torch::stable::contiguous(a_in), b = torch::stable::contiguous(b_in);
  const Tensor out = torch::stable::new_empty(b, b.sizes());
  if (dtype == ScalarType::Float)
    elementwise<float>(a, b, out, f);
  else
    elementwise<vec::Bf16>(a, b, out, f);
  return out;
}

Tensor forward(Tensor x) {
  return dispatch(x, x, [](Float x, Float) { return positive(x) * positive(x); });
}
Tensor backward(Tensor dy, Tensor x) {
  return dispatch(dy, x, [](Float dy, Float x) { return 2.0f * positive(x) * dy; });
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("relu_squared", TORCH_BOX(&forward));
  m.impl("relu_squared_backward", TORCH_BOX(&backward));
}

}  // namespace
