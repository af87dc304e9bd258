// relu(x)^2 and its gradient 2 relu(x) dy on a CPU, each in one pass over memory.
#include <cstring>

#include "../elementwise.h"
#include "dense.h"

namespace relu_squared {
namespace {

using torch::stable::Tensor;
using vec::Float;
using vec::kLanes;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def(kReluSquared);
  m.def(kReluSquaredBackward);
}

inline Float positive(Float x) { return x < 0.0f ? Float{} : x; }  // keeps NaN

// out[i] = f(a[i], b[i])
template <class T, class F>
void elementwise(const T* a, const T* b, T* out, int64_t numel, const F& f) {
  torch::stable::parallel_for(0, numel, 32768, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) vec::store(out + i, f(vec::load(a + i), vec::load(b + i)));
    if (i < end) {
      T rest_a[kLanes] = {}, rest_b[kLanes] = {}, rest[kLanes];
      std::memcpy(rest_a, a + i, (end - i) * sizeof(T));
      std::memcpy(rest_b, b + i, (end - i) * sizeof(T));
      vec::store(rest, f(vec::load(rest_a), vec::load(rest_b)));
      std::memcpy(out + i, rest, (end - i) * sizeof(T));
    }
  });
}

template <class F>
Tensor by_dtype(const Tensor& a_in, const Tensor& b_in, const F& f) {
  return dense::by_dtype(b_in, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Tensor a = dense::tensor<T>("relu_squared", a_in, b_in.numel()), b = dense::tensor<T>("relu_squared", b_in, b_in.numel());
    const Tensor out = dense::like(b);
    elementwise(dense::data<T>(a), dense::data<T>(b), dense::data<T>(out), out.numel(), f);
    return out;
  });
}

Tensor forward(Tensor x) {
  return by_dtype(x, x, [](Float x, Float) { return positive(x) * positive(x); });
}
Tensor backward(Tensor dy, Tensor x) {
  return by_dtype(dy, x, [](Float dy, Float x) { return 2.0f * positive(x) * dy; });
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("relu_squared", TORCH_BOX(&forward));
  m.impl("relu_squared_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace relu_squared
