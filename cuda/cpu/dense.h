// What the elementwise CPU ops share: tensors as dense memory, and one instance of their code for each dtype.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace dense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x, or a copy of it where it isn't contiguous. T is float or vec::Bf16.
template <class T>
Tensor tensor(const char* op, const Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == (std::is_same_v<T, float> ? ScalarType::Float : ScalarType::BFloat16), op,
                  ": needs float32 or bfloat16, one for all");
  STD_TORCH_CHECK(x.numel() == numel, op, ": a tensor has ", x.numel(), " numbers where ", numel, " are needed");
  return torch::stable::contiguous(x);
}

inline Tensor like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Into how many slices rows are cut to be summed up, each slice by one thread. The number of rows alone decides, not that of threads, so the
// sums have the same bits on any number of threads. So few cost nothing that could be measured, even on one thread.
inline int64_t slices_of(int64_t rows) { return std::clamp<int64_t>(rows / 64, 1, 32); }

// Calls f with a null pointer to the type that x is stored in, float or bf16. Sums are fp32 in either.
template <class F>
auto by_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f(static_cast<float*>(nullptr));
  return f(static_cast<vec::Bf16*>(nullptr));
}

}  // namespace dense
