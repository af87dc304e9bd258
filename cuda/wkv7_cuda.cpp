// wkv7 on a GPU for PyTorch: dense tensors, outputs, device guard and current stream around the entry points of wkv7_*.cu.
//
// With HOST_CUDA (tests) the same code registers ops of the same schema in the namespace rwkv7_host for CPU tensors, where host_cuda.h runs the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "on_device.h"
#include "wkv7_schemas.h"

extern "C" {
#define ENTRY_POINTS(kernel)                                                                                                             \
  int64_t wkv7_##kernel##_saved_state_bytes(int head_size, int64_t documents, int64_t tokens, int64_t heads);                            \
  int64_t wkv7_##kernel##_saved_sa_bytes(int head_size, int64_t documents, int64_t tokens, int64_t heads);                               \
  int wkv7_##kernel##_forward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* r, const void* w,     \
                              const void* k, const void* v, const void* a, const void* b, const float* state, const int32_t* cu_seqlens, \
                              void* y, float* final_state, void* saved_state, void* saved_sa, int64_t stream);                           \
  int wkv7_##kernel##_backward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* dy,                  \
                               const float* dfinal_state, const void* r, const void* w, const void* k, const void* v, const void* a,     \
                               const void* b, const int32_t* cu_seqlens, const void* saved_state, const void* saved_sa, void* dr,        \
                               void* dw, void* dk, void* dv, void* da, void* db, float* dstate, int64_t stream);
ENTRY_POINTS(recurrent)
ENTRY_POINTS(chunked)
ENTRY_POINTS(wgmma)
}

namespace wkv7_cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The kernels by the number that the ops take.
struct Kernel {
  const char* name;
  decltype(&wkv7_recurrent_saved_state_bytes) saved_state_bytes, saved_sa_bytes;
  decltype(&wkv7_recurrent_forward) forward;
  decltype(&wkv7_recurrent_backward) backward;
};
#define KERNEL(name) {#name, wkv7_##name##_saved_state_bytes, wkv7_##name##_saved_sa_bytes, wkv7_##name##_forward, wkv7_##name##_backward}
constexpr Kernel kKernels[] = {KERNEL(recurrent), KERNEL(chunked), KERNEL(wgmma)};

// What both directions need: dense inputs, sizes, and the device made current for as long as this lives.
struct Call {
  OnDevice device;
  Tensor r, w, k, v, a, b;
  Optional state, cu_seqlens;
  int dtype, head_size, heads, documents;
  int64_t tokens_each, tokens;
  const Kernel* kernel;

  Call(const Tensor& r_, const Tensor& w_, const Tensor& k_, const Tensor& v_, const Tensor& a_, const Tensor& b_, const Optional& state_,
       const Optional& cu_seqlens_, int64_t kernel_)
      : device(r_), r(dense(r_)), w(dense(w_)), k(dense(k_)), v(dense(v_)), a(dense(a_)), b(dense(b_)) {
    dtype = dtype_number(r);
    STD_TORCH_CHECK(kernel_ >= 0 && kernel_ < 3, "wkv7: there is no kernel ", kernel_);
    kernel = &kKernels[kernel_];
    tokens_each = r.size(1);
    tokens = r.size(0) * r.size(1);
    // The kernels count tokens in 32 bits.
    STD_TORCH_CHECK(tokens > 0 && tokens < (int64_t(1) << 31), "wkv7: needs from 1 to 2^31 - 1 tokens, got ", tokens);
    heads = int(r.size(2));
    head_size = int(r.size(3));
    documents = int(r.size(0));
    if (cu_seqlens_) {
      cu_seqlens = torch::stable::contiguous(*cu_seqlens_);
      documents = int(cu_seqlens->size(0)) - 1;
    }
    if (state_) state = dense(*state_);
  }

  // Contiguous, and at an address that 16-byte loads may use (a slice of a larger tensor need not be).
  static Tensor dense(const Tensor& x) {
    const Tensor y = torch::stable::contiguous(x);
    return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? torch::stable::clone(y) : y;
  }

  // What forward keeps for backward.
  int64_t saved_state_bytes() const {
    return kernel->saved_state_bytes(head_size, documents, tokens, heads);
  }
  int64_t saved_sa_bytes() const {
    return kernel->saved_sa_bytes(head_size, documents, tokens, heads);
  }

  Tensor like() const { return torch::stable::new_empty(r, r.sizes(), r.scalar_type()); }
  Tensor states() const { return torch::stable::new_empty(r, {documents, heads, head_size, head_size}, ScalarType::Float); }
  Tensor floats(int64_t bytes) const { return torch::stable::new_empty(r, {bytes / 4}, ScalarType::Float); }
  const float* state_pointer() const { return state ? static_cast<const float*>(state->const_data_ptr()) : nullptr; }
  const int32_t* bounds() const { return cu_seqlens ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr()) : nullptr; }

  void check(int code, const char* op) const {
    STD_TORCH_CHECK(code != -1, op, ": no ", kernel->name, " kernel for head size ", head_size,
                    " and this dtype (recurrent: 32, 64, 128; chunked and wgmma: bfloat16 and 64)");
    check_launch(code, op);
  }
};

Forward forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Optional state, Optional cu_seqlens, bool save, int64_t kernel) {
  const Call c(r, w, k, v, a, b, state, cu_seqlens, kernel);
  const Tensor y = c.like(), final_state = c.states();
  // The kernel by warpgroups needs its saved_sa, scratch memory, also when nothing is kept.
  const Tensor saved_state = c.floats(save ? c.saved_state_bytes() : 0), saved_sa = c.floats(save || kernel == 2 ? c.saved_sa_bytes() : 0);
  c.check(c.kernel->forward(c.dtype, c.head_size, c.documents, c.tokens_each, c.heads, c.r.const_data_ptr(), c.w.const_data_ptr(), c.k.const_data_ptr(),
              c.v.const_data_ptr(), c.a.const_data_ptr(), c.b.const_data_ptr(), c.state_pointer(), c.bounds(), y.mutable_data_ptr(),
              static_cast<float*>(final_state.mutable_data_ptr()), save ? saved_state.mutable_data_ptr() : nullptr,
              saved_sa.numel() ? saved_sa.mutable_data_ptr() : nullptr, c.device.stream),
          "wkv7 forward");
  return {y, final_state, saved_state, saved_sa};
}

Backward backward(Tensor dy, Optional dfinal_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Optional state,
                  Optional cu_seqlens, Tensor saved_state, Tensor saved_sa, int64_t kernel) {
  const Call c(r, w, k, v, a, b, state, cu_seqlens, kernel);
  wkv7::check_saved("saved_state", saved_state, c.saved_state_bytes() / 4);
  wkv7::check_saved("saved_sa", saved_sa, c.saved_sa_bytes() / 4);
  wkv7::check_dy(dy, c.r);
  const Tensor dy_dense = Call::dense(dy);
  Optional dfinal;
  if (dfinal_state) {
    wkv7::check_dfinal_state(*dfinal_state, c.documents, c.heads, c.head_size);
    dfinal = Call::dense(*dfinal_state);
  }
  const Tensor dr = c.like(), dw = c.like(), dk = c.like(), dv = c.like(), da = c.like(), db = c.like();
  // Empty where there was no initial state: a schema has no optional outputs.
  const Tensor dstate = state ? c.states() : c.floats(0);
  c.check(c.kernel->backward(c.dtype, c.head_size, c.documents, c.tokens_each, c.heads, dy_dense.const_data_ptr(),
              dfinal ? static_cast<const float*>(dfinal->const_data_ptr()) : nullptr, c.r.const_data_ptr(), c.w.const_data_ptr(),
              c.k.const_data_ptr(), c.v.const_data_ptr(), c.a.const_data_ptr(), c.b.const_data_ptr(), c.bounds(), saved_state.const_data_ptr(),
              saved_sa.const_data_ptr(), dr.mutable_data_ptr(), dw.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
              da.mutable_data_ptr(), db.mutable_data_ptr(), state ? static_cast<float*>(dstate.mutable_data_ptr()) : nullptr, c.device.stream),
          "wkv7 backward");
  return {dr, dw, dk, dv, da, db, dstate};
}

#if defined(HOST_CUDA)
STABLE_TORCH_LIBRARY(rwkv7_host, m) {
  m.def(kWkv7Forward);
  m.def(kWkv7Backward);
}
STABLE_TORCH_LIBRARY_IMPL(rwkv7_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rwkv7, CUDA, m) {
#endif
  m.impl("wkv7_forward", TORCH_BOX(&forward));
  m.impl("wkv7_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wkv7_cuda
