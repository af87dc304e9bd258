// AdamW's step on a GPU for PyTorch, around the entry point of adamw.cu.
//
// With HOST_CUDA (tests) the same code registers an op of the same schema in the namespace rwkv7_host for CPU tensors, where host_cuda.h runs the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "adamw.h"
#include "on_device.h"

extern "C" int adamw_step(int dtype, int tensors, void* const* parameters, const void* const* gradients, float* const* masters,
                          float* const* exp_avgs, float* const* exp_avg_sqs, const int64_t* numels, const float* steps, const float* lr,
                          const float* grad_scale, const float* found_inf, double beta1, double beta2, double log_beta1, double log_beta2,
                          double eps, double weight_decay, int64_t stream);

namespace adamw_cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Addresses of dense tensors, as many numbers each as the parameters have.
template <class T>
std::vector<T*> addresses(const char* name, const Tensors& tensors, const Tensors& like, ScalarType dtype) {
  STD_TORCH_CHECK(tensors.size() == like.size(), "adamw: there are ", like.size(), " parameters and ", tensors.size(), " ", name);
  std::vector<T*> found;
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& x = tensors[i];
    STD_TORCH_CHECK(x.numel() == like[i].numel() && x.is_contiguous() && x.scalar_type() == dtype &&
                        x.get_device_index() == like[i].get_device_index(),
                    "adamw: ", name, " must be dense, of the parameters' sizes, on their device, and of one dtype");
    found.push_back(static_cast<T*>(x.mutable_data_ptr()));
  }
  return found;
}

const float* number(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.numel() == 1 && x.scalar_type() == ScalarType::Float && x.get_device_index() == like.get_device_index(),
                  "adamw: steps, lr, grad_scale and found_inf must be float32 [1] on the parameters' device");
  return static_cast<const float*>(x.const_data_ptr());
}

void step(Tensors parameters, Tensors gradients, Tensors masters, Tensors exp_avgs, Tensors exp_avg_sqs, Tensor steps, Tensor lr, Tensor grad_scale,
          Tensor found_inf, double beta1, double beta2, double eps, double weight_decay) {
  if (parameters.empty()) return;
  const Tensor& first = parameters[0];
  const OnDevice device(first);
  const int dtype = dtype_number(first);
  STD_TORCH_CHECK(dtype >= 0, "adamw: parameters must be float32, bfloat16 or float16");
  for (Tensor& x : gradients) x = torch::stable::contiguous(x);
  std::vector<int64_t> numels;
  for (const Tensor& x : parameters) numels.push_back(x.numel());
  const auto to = addresses<void>("parameters", parameters, parameters, first.scalar_type());
  const auto from = addresses<const void>("gradients", gradients, parameters, first.scalar_type());
  const auto of_master = addresses<float>("masters", masters, parameters, ScalarType::Float);
  const auto m = addresses<float>("exp_avgs", exp_avgs, parameters, ScalarType::Float);
  const auto v = addresses<float>("exp_avg_sqs", exp_avg_sqs, parameters, ScalarType::Float);
  check_launch(adamw_step(dtype, int(parameters.size()), to.data(), from.data(), of_master.data(), m.data(), v.data(), numels.data(),
                          number(steps, first), number(lr, first), number(grad_scale, first), number(found_inf, first), beta1, beta2,
                          std::log(beta1), std::log(beta2), eps, weight_decay, device.stream),
               "adamw");
}

#if defined(HOST_CUDA)
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7_host, m) { m.def(kAdamW); }
STABLE_TORCH_LIBRARY_IMPL(rwkv7_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) { m.def(kAdamW); }
STABLE_TORCH_LIBRARY_IMPL(rwkv7, CUDA, m) {
#endif
  m.impl("adamw_", TORCH_BOX(&step));
}

}  // namespace
}  // namespace adamw_cuda
