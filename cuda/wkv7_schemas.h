// Schemas of wkv7's ops. src/ops/recurrence.py, their only caller, has checked shapes, dtypes and devices of r to b, state and cu_seqlens; the
// implementations check only what it can't know: values of cu_seqlens (on a CPU), tensors from autograd, sizes without a kernel.
//
// saved_state and saved_sa are what forward keeps for backward; each implementation has its own layout (empty when save is false).
// kernel: 0 recurrent, 1 chunked, 2 by warpgroups (CUDA only); KERNEL_NUMBERS in src/ops/recurrence_op.py. A number, not a name: a str argument
// through the stable ABI of torch 2.10 to 2.13 leaks 48 bytes at each call.
// w is the raw decay, dw its gradient; states are fp32 [sequences, H, N (value), N (key)].
#pragma once
#include <torch/csrc/stable/tensor.h>

constexpr const char* kWkv7Forward =
    "wkv7_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, Tensor? cu_seqlens, bool save, int kernel)"
    " -> (Tensor y, Tensor final_state, Tensor saved_state, Tensor saved_sa)";
constexpr const char* kWkv7Backward =
    "wkv7_backward(Tensor dy, Tensor? dfinal_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state,"
    " Tensor? cu_seqlens, Tensor saved_state, Tensor saved_sa, int kernel)"
    " -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dstate)";

namespace wkv7 {

// What forward kept, as backward is given it: read with another size it would be memory outside of the tensor.
inline void check_saved(const char* name, const torch::stable::Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous() && x.numel() == numel, "wkv7: backward needs ",
                  name, " as forward saves it with save=true: float32, contiguous, ", numel, " elements; got ", x.numel());
}

inline void check_dy(const torch::stable::Tensor& dy, const torch::stable::Tensor& r) {
  bool same = dy.scalar_type() == r.scalar_type() && dy.dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = dy.size(d) == r.size(d);
  STD_TORCH_CHECK(same, "wkv7: dy must have the shape and dtype of r");
}

inline void check_dfinal_state(const torch::stable::Tensor& x, int64_t documents, int64_t heads, int64_t head_size) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.dim() == 4 && x.size(0) == documents && x.size(1) == heads &&
                      x.size(2) == head_size && x.size(3) == head_size,
                  "wkv7: dfinal_state must be float32 [", documents, ", ", heads, ", ", head_size, ", ", head_size, "]");
}

}  // namespace wkv7
