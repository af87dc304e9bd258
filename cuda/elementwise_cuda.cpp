// A block's elementwise ops on a GPU for PyTorch, around the entry points of token_shift.cu, time_mix.cu and relu_squared.cu.
//
// With HOST_CUDA (tests) the same code registers ops of the same schema in the namespace rwkv7_host for CPU tensors, where host_cuda.h runs the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "elementwise.h"
#include "on_device.h"

extern "C" {
int64_t token_shift_partial_numbers(int mixes, int64_t rows, int width);
int token_shift_forward(int dtype, int mixes, int64_t rows, int64_t tokens_each, int documents, int width, const void* x, const void* last,
                        const int32_t* cu_seqlens, const void* const* mix, void* const* out, int64_t stream);
int token_shift_backward(int dtype, int mixes, int64_t rows, int64_t tokens_each, int documents, int width, const void* const* d, const void* x,
                         const void* last, const int32_t* cu_seqlens, const void* const* mix, void* dx, void* dlast, void* const* dmix,
                         float* partial, int64_t stream);
int64_t time_mix_partial_numbers(int64_t rows, int width);
int time_mix_inputs_forward(int dtype, int64_t rows, int width, int head_size, const void* k, const void* v, const void* a, const void* v_first,
                            const void* residual, const void* k_k, const void* k_a, const void* a0, const void* v0, void* key, void* value,
                            void* remove, void* replace, int64_t stream);
int time_mix_inputs_backward(int dtype, int64_t rows, int width, int head_size, const void* dkey, const void* dvalue, const void* dremove,
                             const void* dreplace, const void* k, const void* v, const void* a, const void* v_first, const void* residual,
                             const void* k_k, const void* k_a, const void* a0, const void* v0, void* dk, void* dv, void* da, void* dv_first,
                             void* dresidual, void* dk_k, void* dk_a, void* da0, void* dv0, float* partial, int64_t stream);
int time_mix_output_forward(int dtype, int64_t rows, int width, int head_size, float eps, const void* y, const void* r, const void* k,
                            const void* v, const void* g, const void* r_k, const void* weight, const void* bias, void* out, int64_t stream);
int time_mix_output_backward(int dtype, int64_t rows, int width, int head_size, float eps, const void* dout, const void* y, const void* r,
                             const void* k, const void* v, const void* g, const void* r_k, const void* weight, const void* bias, void* dy,
                             void* dr, void* dk, void* dv, void* dg, void* dr_k, void* dweight, void* dbias, float* partial, int64_t stream);
int relu_squared_forward(int dtype, int64_t numel, const void* x, void* out, int64_t stream);
int relu_squared_backward(int dtype, int64_t numel, const void* dy, const void* x, void* dx, int64_t stream);
}

namespace elementwise_cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The tensors of a call: dense, aligned, of one dtype and on one device. Their pointers live as long as this.
class Call {
 public:
  const OnDevice device;
  const int dtype;

  Call(const char* op, const Tensor& first) : device(first), dtype(dtype_number(first)), op_(op), first_(first) {
    STD_TORCH_CHECK(dtype >= 0, op, ": needs float32, bfloat16 or float16");
  }

  // Of a tensor that is read, with `numel` numbers; null where there is none.
  const void* in(const Tensor& x, int64_t numel) {
    STD_TORCH_CHECK(x.scalar_type() == first_.scalar_type() && x.get_device_index() == first_.get_device_index(), op_,
                    ": all tensors must have one dtype and be on one device");
    STD_TORCH_CHECK(x.numel() == numel, op_, ": a tensor has ", x.numel(), " numbers where ", numel, " are needed");
    Tensor dense = torch::stable::contiguous(x);
    if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16) dense = torch::stable::clone(dense);
    held_[count_] = dense;
    return held_[count_++]->const_data_ptr();
  }
  const void* in(const Optional& x, int64_t numel) { return x ? in(*x, numel) : nullptr; }

  Tensor floats(int64_t numel) const { return torch::stable::new_empty(first_, {numel}, ScalarType::Float); }
  void check(int code) const {
    STD_TORCH_CHECK(code != -1, op_, ": there is no kernel for this head size (powers of two up to 128)");
    check_launch(code, op_);
  }

 private:
  const char* op_;
  const Tensor& first_;
  std::array<Optional, 16> held_;
  int count_ = 0;
};

Tensor like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }
Tensor nothing(const Tensor& x) { return torch::stable::new_empty(x, {0}); }
void* out(const Tensor& x) { return x.mutable_data_ptr(); }
float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// [.., C] as rows of C numbers
struct Rows {
  int64_t count, numel;
  int width;

  Rows(const char* op, const Tensor& x) : numel(x.numel()), width(int(x.size(x.dim() - 1))) {
    STD_TORCH_CHECK(width > 0 && width % 4 == 0, op, ": C must be a multiple of 4, got ", width);
    count = numel / width;
    // kernels count rows, and blocks of 64 rows by 128 channels, in 32 bits
    STD_TORCH_CHECK(count > 0 && count < (int64_t(1) << 31) - 64 && (count / 64 + 1) * (width / 128 + 1) < (int64_t(1) << 31), op,
                    ": needs from 1 to 2^31 - 65 tokens, got ", count);
  }
};

// ---- token shift ------------------------------------------------------------------------------------------------------------------

template <int kMixes>
struct Shift {
  Call call;
  Rows rows;
  Optional bounds;
  int documents;
  int64_t tokens_each;
  const void *x, *last;
  std::array<const void*, kMixes> mix;

  Shift(const Tensor& x_in, const Optional& last_in, const Optional& cu_seqlens, const std::array<Tensor, kMixes>& mixes)
      : call("token_shift", x_in), rows("token_shift", x_in) {
    STD_TORCH_CHECK(x_in.dim() == 3, "token_shift: x must be [B, T, C]");
    documents = int(x_in.size(0));
    tokens_each = x_in.size(1);
    if (cu_seqlens) {
      STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2 && x_in.size(0) == 1 &&
                          cu_seqlens->get_device_index() == x_in.get_device_index(),
                      "token_shift: cu_seqlens must be int32 [documents + 1] on the device of x, with B = 1");
      bounds = torch::stable::contiguous(*cu_seqlens);
      documents = int(bounds->numel()) - 1;
    }
    x = call.in(x_in, rows.numel);
    last = call.in(last_in, int64_t(documents) * rows.width);
    for (int i = 0; i < kMixes; i++) mix[i] = call.in(mixes[i], rows.width);
  }
  const int32_t* cu_seqlens() const { return bounds ? static_cast<const int32_t*>(bounds->const_data_ptr()) : nullptr; }
};

template <int kMixes>
std::array<Tensor, kMixes> shift_forward(const Tensor& x, const Optional& last, const Optional& cu_seqlens, const std::array<Tensor, kMixes>& mixes) {
  const Shift<kMixes> s(x, last, cu_seqlens, mixes);
  std::array<Tensor, kMixes> mixed = mixes;
  std::array<void*, kMixes> to;
  for (int i = 0; i < kMixes; i++) mixed[i] = like(x), to[i] = out(mixed[i]);
  s.call.check(token_shift_forward(s.call.dtype, kMixes, s.rows.count, s.tokens_each, s.documents, s.rows.width, s.x, s.last, s.cu_seqlens(),
                                   s.mix.data(), to.data(), s.call.device.stream));
  return mixed;
}

// dx, dlast and the gradients of the mixes
template <int kMixes>
std::array<Tensor, kMixes + 2> shift_backward(const std::array<Tensor, kMixes>& d, const Tensor& x, const Optional& last, const Optional& cu_seqlens,
                                              const std::array<Tensor, kMixes>& mixes) {
  Shift<kMixes> s(x, last, cu_seqlens, mixes);
  std::array<Tensor, kMixes + 2> gradients;
  std::array<const void*, kMixes> from;
  std::array<void*, kMixes> to;
  for (int i = 0; i < kMixes; i++) {
    from[i] = s.call.in(d[i], s.rows.numel);
    gradients[2 + i] = like(mixes[i]), to[i] = out(gradients[2 + i]);
  }
  gradients[0] = like(x);
  // zeros: a document without tokens gives its state no gradient
  gradients[1] = torch::stable::new_zeros(x, {last ? s.documents : 0, s.rows.width});
  const Tensor partial = s.call.floats(token_shift_partial_numbers(kMixes, s.rows.count, s.rows.width));
  s.call.check(token_shift_backward(s.call.dtype, kMixes, s.rows.count, s.tokens_each, s.documents, s.rows.width, from.data(), s.x, s.last,
                                    s.cu_seqlens(), s.mix.data(), out(gradients[0]), last ? out(gradients[1]) : nullptr, to.data(), floats(partial),
                                    s.call.device.stream));
  return gradients;
}

Tensor shift_1(Tensor x, Optional last, Optional cu_seqlens, Tensor mix) { return shift_forward<1>(x, last, cu_seqlens, {mix})[0]; }

std::tuple<Tensor, Tensor, Tensor> shift_1_backward(Tensor d, Tensor x, Optional last, Optional cu_seqlens, Tensor mix) {
  const auto out = shift_backward<1>({d}, x, last, cu_seqlens, {mix});
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor> shift_3(Tensor x, Optional last, Optional cu_seqlens, Tensor r, Tensor k, Tensor v) {
  const auto out = shift_forward<3>(x, last, cu_seqlens, {r, k, v});
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shift_3_backward(Tensor dr, Tensor dk, Tensor dv, Tensor x, Optional last, Optional cu_seqlens,
                                                                    Tensor r, Tensor k, Tensor v) {
  const auto out = shift_backward<3>({dr, dk, dv}, x, last, cu_seqlens, {r, k, v});
  return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shift_6(Tensor x, Optional last, Optional cu_seqlens, Tensor r, Tensor w, Tensor k,
                                                                   Tensor v, Tensor a, Tensor g) {
  const auto out = shift_forward<6>(x, last, cu_seqlens, {r, w, k, v, a, g});
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shift_6_backward(Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da,
                                                                                            Tensor dg, Tensor x, Optional last, Optional cu_seqlens,
                                                                                            Tensor r, Tensor w, Tensor k, Tensor v, Tensor a,
                                                                                            Tensor g) {
  const auto out = shift_backward<6>({dr, dw, dk, dv, da, dg}, x, last, cu_seqlens, {r, w, k, v, a, g});
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
}

// ---- time mix ---------------------------------------------------------------------------------------------------------------------

int head_of(const Rows& rows, int64_t head_size) {
  STD_TORCH_CHECK(head_size > 0 && rows.width % head_size == 0, "time_mix: C must be a multiple of the head size ", head_size, ", got ", rows.width);
  return int(head_size);
}

// Pointers to the inputs of time_mix_inputs, in the order of its schema.
struct Inputs {
  Call call;
  Rows rows;
  int head_size;
  const void *k, *v, *a, *v_first, *residual, *k_k, *k_a, *a0, *v0;

  Inputs(const Tensor& k_, const Tensor& v_, const Tensor& a_, const Optional& v_first_, const Optional& residual_, const Tensor& k_k_,
         const Tensor& k_a_, const Tensor& a0_, const Optional& v0_, int64_t head_size_)
      : call("time_mix", k_), rows("time_mix", k_), head_size(head_of(rows, head_size_)) {
    STD_TORCH_CHECK(bool(v_first_) == bool(residual_) && bool(v_first_) == bool(v0_), "time_mix: v_first, residual and v0 come together");
    k = call.in(k_, rows.numel), v = call.in(v_, rows.numel), a = call.in(a_, rows.numel);
    v_first = call.in(v_first_, rows.numel), residual = call.in(residual_, rows.numel);
    k_k = call.in(k_k_, rows.width), k_a = call.in(k_a_, rows.width), a0 = call.in(a0_, rows.width), v0 = call.in(v0_, rows.width);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> inputs(Tensor k, Tensor v, Tensor a, Optional v_first, Optional residual, Tensor k_k, Tensor k_a,
                                                  Tensor a0, Optional v0, int64_t head_size) {
  const Inputs in(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size);
  const Tensor key = like(k), value = v_first ? like(v) : nothing(v), remove = like(k), replace = like(k);
  in.call.check(time_mix_inputs_forward(in.call.dtype, in.rows.count, in.rows.width, in.head_size, in.k, in.v, in.a, in.v_first, in.residual, in.k_k,
                                        in.k_a, in.a0, in.v0, out(key), out(value), out(remove), out(replace), in.call.device.stream));
  return {key, value, remove, replace};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inputs_backward(
    Tensor dkey, Tensor dvalue, Tensor dremove, Tensor dreplace, Tensor k, Tensor v, Tensor a, Optional v_first, Optional residual, Tensor k_k,
    Tensor k_a, Tensor a0, Optional v0, int64_t head_size) {
  Inputs in(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size);
  const int64_t numel = in.rows.numel;
  const Tensor dk = like(k), da = like(a), dk_k = like(k_k), dk_a = like(k_a), da0 = like(a0);
  const Tensor dv = v_first ? like(v) : nothing(v), dv_first = v_first ? like(v) : nothing(v), dresidual = v_first ? like(v) : nothing(v);
  const Tensor dv0 = v_first ? like(*v0) : nothing(v), partial = in.call.floats(time_mix_partial_numbers(in.rows.count, in.rows.width));
  const void *from_key = in.call.in(dkey, numel), *from_value = v_first ? in.call.in(dvalue, numel) : nullptr;
  const void *from_remove = in.call.in(dremove, numel), *from_replace = in.call.in(dreplace, numel);
  in.call.check(time_mix_inputs_backward(in.call.dtype, in.rows.count, in.rows.width, in.head_size, from_key, from_value, from_remove, from_replace,
                                         in.k, in.v, in.a, in.v_first, in.residual, in.k_k, in.k_a, in.a0, in.v0, out(dk), out(dv), out(da),
                                         out(dv_first), out(dresidual), out(dk_k), out(dk_a), out(da0), v_first ? out(dv0) : nullptr,
                                         floats(partial), in.call.device.stream));
  return {dk, dv, da, dv_first, dresidual, dk_k, dk_a, da0, dv0};
}

struct Outputs {
  Call call;
  Rows rows;
  int head_size;
  const void *y, *r, *k, *v, *g, *r_k, *weight, *bias;

  Outputs(const Tensor& y_, const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& r_k_, const Tensor& weight_,
          const Tensor& bias_, int64_t head_size_)
      : call("time_mix", g_), rows("time_mix", g_), head_size(head_of(rows, head_size_)) {
    y = call.in(y_, rows.numel), r = call.in(r_, rows.numel), k = call.in(k_, rows.numel), v = call.in(v_, rows.numel), g = call.in(g_, rows.numel);
    r_k = call.in(r_k_, rows.width), weight = call.in(weight_, rows.width), bias = call.in(bias_, rows.width);
  }
};

Tensor output(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, double eps, int64_t head_size) {
  const Outputs in(y, r, k, v, g, r_k, weight, bias, head_size);
  const Tensor result = like(g);
  in.call.check(time_mix_output_forward(in.call.dtype, in.rows.count, in.rows.width, in.head_size, float(eps), in.y, in.r, in.k, in.v, in.g, in.r_k,
                                        in.weight, in.bias, out(result), in.call.device.stream));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> output_backward(Tensor dout, Tensor y, Tensor r, Tensor k, Tensor v,
                                                                                           Tensor g, Tensor r_k, Tensor weight, Tensor bias,
                                                                                           double eps, int64_t head_size) {
  Outputs in(y, r, k, v, g, r_k, weight, bias, head_size);
  const void* from = in.call.in(dout, in.rows.numel);
  const Tensor dy = like(y), dr = like(r), dk = like(k), dv = like(v), dg = like(g), dr_k = like(r_k), dweight = like(weight), dbias = like(bias);
  const Tensor partial = in.call.floats(time_mix_partial_numbers(in.rows.count, in.rows.width));
  in.call.check(time_mix_output_backward(in.call.dtype, in.rows.count, in.rows.width, in.head_size, float(eps), from, in.y, in.r, in.k, in.v, in.g,
                                         in.r_k, in.weight, in.bias, out(dy), out(dr), out(dk), out(dv), out(dg), out(dr_k), out(dweight),
                                         out(dbias), floats(partial), in.call.device.stream));
  return {dy, dr, dk, dv, dg, dr_k, dweight, dbias};
}

// ---- squared ReLU -----------------------------------------------------------------------------------------------------------------

Tensor relu(Tensor x) {
  Call call("relu_squared", x);
  const Tensor y = like(x);
  const void* from = call.in(x, x.numel());
  call.check(relu_squared_forward(call.dtype, x.numel(), from, out(y), call.device.stream));
  return y;
}

Tensor relu_backward(Tensor dy, Tensor x) {
  Call call("relu_squared", x);
  const Tensor dx = like(x);
  const void *from_y = call.in(dy, x.numel()), *from_x = call.in(x, x.numel());
  call.check(relu_squared_backward(call.dtype, x.numel(), from_y, from_x, out(dx), call.device.stream));
  return dx;
}

#if defined(HOST_CUDA)
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7_host, m) {
  m.def(kTokenShift1);
  m.def(kTokenShift1Backward);
  m.def(kTokenShift3);
  m.def(kTokenShift3Backward);
  m.def(kTokenShift6);
  m.def(kTokenShift6Backward);
  m.def(kTimeMixInputs);
  m.def(kTimeMixInputsBackward);
  m.def(kTimeMixOutput);
  m.def(kTimeMixOutputBackward);
  m.def(kReluSquared);
  m.def(kReluSquaredBackward);
}
STABLE_TORCH_LIBRARY_IMPL(rwkv7_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rwkv7, CUDA, m) {
#endif
  m.impl("token_shift_1", TORCH_BOX(&shift_1));
  m.impl("token_shift_1_backward", TORCH_BOX(&shift_1_backward));
  m.impl("token_shift_3", TORCH_BOX(&shift_3));
  m.impl("token_shift_3_backward", TORCH_BOX(&shift_3_backward));
  m.impl("token_shift_6", TORCH_BOX(&shift_6));
  m.impl("token_shift_6_backward", TORCH_BOX(&shift_6_backward));
  m.impl("time_mix_inputs", TORCH_BOX(&inputs));
  m.impl("time_mix_inputs_backward", TORCH_BOX(&inputs_backward));
  m.impl("time_mix_output", TORCH_BOX(&output));
  m.impl("time_mix_output_backward", TORCH_BOX(&output_backward));
  m.impl("relu_squared", TORCH_BOX(&relu));
  m.impl("relu_squared_backward", TORCH_BOX(&relu_backward));
}

}  // namespace
}  // namespace elementwise_cuda
