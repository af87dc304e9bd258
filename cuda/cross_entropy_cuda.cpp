// Cross entropy with L2Wrap on a GPU for PyTorch, around the entry points of cross_entropy.cu.
//
// With HOST_CUDA (tests) the same code registers ops of the same schema in the namespace rwkv7_host for CPU tensors, where host_cuda.h runs the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cross_entropy.h"
#include "on_device.h"

extern "C" {
int cross_entropy_l2wrap_forward(int dtype, int64_t rows, int vocabulary, const void* logits, const int64_t* targets, int64_t ignore_index,
                                 float* nll, float* largest, float* total, int64_t* where, int64_t stream);
int cross_entropy_l2wrap_backward(int dtype, int64_t rows, int vocabulary, void* logits, const int64_t* targets, const float* largest,
                                  const float* total, const int64_t* where, const float* scale, float l2wrap, int64_t stream);
}

namespace cross_entropy_cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_logits(const Tensor& logits, const Tensor& targets) {
  constexpr int64_t limit = int64_t(1) << 31;
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(0) < limit && logits.size(1) >= 1 && logits.size(1) < limit - 4096,
                  "cross_entropy_l2wrap: logits must be [rows, V] and dense");
  STD_TORCH_CHECK(dtype_number(logits) >= 0, "cross_entropy_l2wrap: logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(targets.get_device_index() == logits.get_device_index(), "cross_entropy_l2wrap: logits and targets must be on one device");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == ScalarType::Long,
                  "cross_entropy_l2wrap: targets must be int64 [rows]");
}

// A tensor of one number a row, dense.
Tensor per_row(const Tensor& x, const Tensor& logits, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == logits.size(0) && x.scalar_type() == dtype,
                  "cross_entropy_l2wrap: largest, total, where and scale must be what forward returned, and float32 [rows]");
  return torch::stable::contiguous(x);
}
const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor targets_, int64_t ignore_index) {
  check_logits(logits, targets_);
  const OnDevice device(logits);
  const Tensor targets = torch::stable::contiguous(targets_);
  const int64_t rows = logits.size(0);
  const auto fresh = [&](ScalarType dtype) { return torch::stable::new_empty(logits, {rows}, dtype); };
  const Tensor nll = fresh(ScalarType::Float), largest = fresh(ScalarType::Float), total = fresh(ScalarType::Float), where = fresh(ScalarType::Long);
  check_launch(cross_entropy_l2wrap_forward(dtype_number(logits), rows, int(logits.size(1)), logits.const_data_ptr(), integers(targets), ignore_index,
                                            static_cast<float*>(nll.mutable_data_ptr()), static_cast<float*>(largest.mutable_data_ptr()),
                                            static_cast<float*>(total.mutable_data_ptr()), static_cast<int64_t*>(where.mutable_data_ptr()),
                                            device.stream),
               "cross_entropy_l2wrap forward");
  return {nll, largest, total, where};
}

void backward(Tensor logits, Tensor targets_, Tensor largest_, Tensor total_, Tensor where_, Tensor scale_, double l2wrap) {
  check_logits(logits, targets_);
  const OnDevice device(logits);
  const Tensor targets = torch::stable::contiguous(targets_), where = per_row(where_, logits, ScalarType::Long);
  const Tensor largest = per_row(largest_, logits, ScalarType::Float), total = per_row(total_, logits, ScalarType::Float);
  const Tensor scale = per_row(scale_, logits, ScalarType::Float);
  check_launch(cross_entropy_l2wrap_backward(dtype_number(logits), logits.size(0), int(logits.size(1)), logits.mutable_data_ptr(), integers(targets),
                                             floats(largest), floats(total), integers(where), floats(scale), float(l2wrap), device.stream),
               "cross_entropy_l2wrap backward");
}

#if defined(HOST_CUDA)
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7_host, m) {
  m.def(kCrossEntropyForward);
  m.def(kCrossEntropyBackward);
}
STABLE_TORCH_LIBRARY_IMPL(rwkv7_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rwkv7, CUDA, m) {
#endif
  m.impl("cross_entropy_l2wrap_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_l2wrap_backward_", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace cross_entropy_cuda
