// wkv7 on a CPU for PyTorch: dense tensors, outputs and threads around the kernel in wkv7_cpu.cpp. Binds by PyTorch's stable ABI: one binary
// serves several torch versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "../wkv7_schemas.h"
#include "wkv7_cpu.h"

namespace wkv7 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Here and not with the CUDA kernels: every build of the library has this file.
STABLE_TORCH_LIBRARY(rwkv7, m) {
  m.def(kWkv7Forward);
  m.def(kWkv7Backward);
}

wkv7_cpu::Dtype cpu_dtype(const Tensor& r) {
  switch (r.scalar_type()) {
    case ScalarType::Float: return wkv7_cpu::Dtype::f32;
    case ScalarType::BFloat16: return wkv7_cpu::Dtype::bf16;
    case ScalarType::Half: return wkv7_cpu::Dtype::f16;
    default: STD_TORCH_CHECK(false, "wkv7: no CPU kernel for this dtype"); return {};
  }
}

// Strided rows are read in place (views of a fused projection too); only a last dimension that isn't dense is copied.
Tensor dense_rows(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

wkv7_cpu::Rows rows(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Owns the memory that a Problem points to.
struct CpuInputs {
  Tensor r, w, k, v, a, b;
  Optional state, cu_seqlens;

  CpuInputs(const Tensor& r_, const Tensor& w_, const Tensor& k_, const Tensor& v_, const Tensor& a_, const Tensor& b_,
            const Optional& state_, const Optional& cu_seqlens_, int64_t kernel)
      : r(dense_rows(r_)), w(dense_rows(w_)), k(dense_rows(k_)), v(dense_rows(v_)), a(dense_rows(a_)), b(dense_rows(b_)) {
    STD_TORCH_CHECK(kernel == 0, "wkv7: the chunked kernel does not exist on a CPU");
    STD_TORCH_CHECK(r.size(3) % 16 == 0, "wkv7: no CPU kernel for head size ", r.size(3), ", which is not a multiple of 16");
    if (cu_seqlens_) {
      cu_seqlens = torch::stable::contiguous(*cu_seqlens_);
      const int64_t documents = cu_seqlens->size(0) - 1;
      const auto* bounds = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
      STD_TORCH_CHECK(bounds[0] == 0 && bounds[documents] == r.size(1), "wkv7: cu_seqlens must run from 0 to T = ", r.size(1));
      for (int64_t d = 0; d < documents; ++d)
        STD_TORCH_CHECK(bounds[d] <= bounds[d + 1], "wkv7: cu_seqlens must not decrease (at document ", d, ")");
    }
    if (state_) state = torch::stable::contiguous(*state_);
  }

  int64_t documents() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : r.size(0); }

  void fill(wkv7_cpu::Problem& p) const {
    p.B = r.size(0), p.T = r.size(1), p.H = r.size(2), p.N = r.size(3);
    p.dtype = cpu_dtype(r);
    p.cu_seqlens = cu_seqlens ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr()) : nullptr;
    p.documents = documents();
    p.r = rows(r), p.w = rows(w), p.k = rows(k), p.v = rows(v), p.a = rows(a), p.b = rows(b);
    p.state = state ? static_cast<const float*>(state->const_data_ptr()) : nullptr;
  }
  Tensor states(int64_t n) const { return torch::stable::new_empty(r, {n, r.size(2), r.size(3), r.size(3)}, ScalarType::Float); }
  Tensor like(ScalarType dtype) const { return torch::stable::new_empty(r, r.sizes(), dtype); }
  Tensor nothing() const { return torch::stable::new_empty(r, {0}, ScalarType::Float); }
};

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Units differ in length when documents are packed, so threads draw them one by one.
template <class F>
void in_parallel(int64_t units, const F& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1)) < units;) run(unit);
  });
}

Forward cpu_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Optional state, Optional cu_seqlens, bool save,
                    int64_t kernel) {
  const CpuInputs in(r, w, k, v, a, b, state, cu_seqlens, kernel);
  wkv7_cpu::Forward p;
  in.fill(p);
  const Tensor y = in.like(in.r.scalar_type()), final_state = in.states(p.documents);
  const Tensor saved_state = save ? in.states(saved_states(p)) : in.nothing();
  const Tensor saved_sa = save ? in.like(ScalarType::Float) : in.nothing();
  p.y = y.mutable_data_ptr(), p.final_state = floats(final_state);
  p.saved_state = save ? floats(saved_state) : nullptr, p.saved_sa = save ? floats(saved_sa) : nullptr;
  in_parallel(p.units(), [&](int64_t unit) { wkv7_cpu::forward_unit(p, unit); });
  return {y, final_state, saved_state, saved_sa};
}

Backward cpu_backward(Tensor dy, Optional dfinal_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Optional state,
                      Optional cu_seqlens, Tensor saved_state, Tensor saved_sa, int64_t kernel) {
  const CpuInputs in(r, w, k, v, a, b, state, cu_seqlens, kernel);
  check_dy(dy, in.r);
  wkv7_cpu::Backward p;
  in.fill(p);
  check_saved("saved_state", saved_state, saved_states(p) * p.H * p.N * p.N);
  check_saved("saved_sa", saved_sa, in.r.numel());
  const Tensor dy_rows = dense_rows(dy);
  p.dy = rows(dy_rows);
  Optional dfinal;
  if (dfinal_state) {
    check_dfinal_state(*dfinal_state, p.documents, p.H, p.N);
    dfinal = torch::stable::contiguous(*dfinal_state);
  }
  p.dfinal_state = dfinal ? floats(*dfinal) : nullptr;
  p.saved_state = floats(saved_state), p.saved_sa = floats(saved_sa);
  const auto dtype = in.r.scalar_type();
  const Tensor dr = in.like(dtype), dw = in.like(dtype), dk = in.like(dtype), dv = in.like(dtype), da = in.like(dtype), db = in.like(dtype);
  // Without an initial state it has no gradient: the op returns an empty tensor, since a schema has no optional outputs.
  const Tensor dstate = state ? in.states(p.documents) : in.nothing();
  p.dr = dr.mutable_data_ptr(), p.dw = dw.mutable_data_ptr(), p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr(), p.da = da.mutable_data_ptr(), p.db = db.mutable_data_ptr();
  p.dstate = state ? floats(dstate) : nullptr;
  in_parallel(p.units(), [&](int64_t unit) { wkv7_cpu::backward_unit(p, unit); });
  return {dr, dw, dk, dv, da, db, dstate};
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("wkv7_forward", TORCH_BOX(&cpu_forward));
  m.impl("wkv7_backward", TORCH_BOX(&cpu_backward));
}

}  // namespace
}  // namespace wkv7
