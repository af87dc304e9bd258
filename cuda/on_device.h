// The device of a tensor made current for as long as this lives, and its current stream as the integer that entry points of .cu files take.
// With HOST_CUDA (tests) there is neither.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(HOST_CUDA)

struct OnDevice {
  int64_t stream = 0;
  explicit OnDevice(const torch::stable::Tensor&) {}
};

#else

#include <torch/csrc/stable/accelerator.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  int64_t stream = 0;
  explicit OnDevice(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = reinterpret_cast<int64_t>(current);
  }
};

#endif

// 0: fp32, 1: bf16, 2: fp16, as entry points of .cu files number them; -1: another.
inline int dtype_number(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType scalar = x.scalar_type();
  return scalar == ScalarType::Float ? 0 : scalar == ScalarType::BFloat16 ? 1 : scalar == ScalarType::Half ? 2 : -1;
}
