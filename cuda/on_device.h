// What every CUDA op does around its entry point in a .cu file: the tensor's device made current, its current stream, and the check of the result.
// With HOST_CUDA (tests) there are no devices.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if !defined(HOST_CUDA)
#include <torch/csrc/stable/accelerator.h>

// torch/csrc/inductor/aoti_torch/c/shim.h declares it only with USE_CUDA, which would ask for CUDA's own headers. 0: success.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

#if defined(HOST_CUDA)

struct OnDevice {
  int64_t stream = 0;
  explicit OnDevice(const torch::stable::Tensor&) {}
};

#else

// Makes the tensor's device current for as long as it lives; `stream` is that device's current stream, as the integer that entry points take.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  int64_t stream = 0;
  explicit OnDevice(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    // Not PyTorch's macro for this: torch 2.10 to 2.12 call it TORCH_ERROR_CODE_CHECK, later ones STABLE_TORCH_ERROR_CODE_CHECK.
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current) == 0,
                    "PyTorch has no current stream for CUDA device ", x.get_device_index());
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

// Raises for the code that an entry point returned: 0 or CUDA's error number (negative codes are the caller's own).
inline void check_launch(int code, const char* op) {
  // Errors of a kernel's execution arrive with a later call, of whichever kernel that is: cudaErrorIllegalAddress (700), cudaErrorAssert (710)
  // to cudaErrorLaunchFailure (719), cudaErrorECCUncorrectable (214), cudaErrorLaunchTimeout (702).
  const bool of_earlier_work = code == 214 || code == 700 || code == 702 || (code >= 710 && code <= 719);
  STD_TORCH_CHECK(!of_earlier_work, op, ": work that was started before on this GPU has failed with CUDA error ", code,
                  "; CUDA_LAUNCH_BLOCKING=1 shows which");
  // cudaErrorInvalidDeviceFunction, cudaErrorNoKernelImageForDevice
  STD_TORCH_CHECK(code != 98 && code != 209, op, ": the library was built for other GPUs (CUDA error ", code,
                  "); set TORCH_CUDA_ARCH_LIST to this GPU's capability");
  STD_TORCH_CHECK(code == 0, op, ": the launch failed with CUDA error ", code);
}

}  // namespace
