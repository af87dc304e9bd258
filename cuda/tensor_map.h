// TMA's description of a tensor, by the CUDA driver: apart from port.cuh because it has no counterpart on AMD's GPUs.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace port {

struct alignas(128) TensorMap {
  CUtensorMap map;
};

// [tokens, heads, 64] of bf16, fetched by `rows` tokens of a head, in shared memory with the 128-byte swizzle. 0 or the runtime's error number.
inline int encode_tensor_map(TensorMap& to, const void* from, int64_t tokens, int heads, int rows) {
  // The driver's function through the runtime: the library needn't link the driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return int(cudaErrorNotSupported);
  const cuuint64_t sizes[3] = {64, cuuint64_t(heads), cuuint64_t(tokens)}, strides[2] = {128, cuuint64_t(heads) * 128};
  const cuuint32_t box[3] = {64, 1, cuuint32_t(rows)}, steps[3] = {1, 1, 1};
  const CUresult failed = encode(&to.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(from), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return failed ? int(cudaErrorInvalidValue) : 0;
}

}  // namespace port
