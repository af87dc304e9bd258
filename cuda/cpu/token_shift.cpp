// Token shift with its learned mixes on a CPU, all mixes in one pass over memory:
//
//   mixed_i[t] = x[t] + (x[t-1] - x[t]) mix_i,   x[-1] = last (or 0), for each document anew
//
// backward, from the last token to the first:  dx[t] = sum_i dmixed_i[t] (1 - mix_i) + sum_i dmixed_i[t+1] mix_i,
// dlast = sum_i dmixed_i[first] mix_i,  dmix_i = sum over t of dmixed_i[t] (x[t-1] - x[t]).
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../elementwise.h"
#include "dense.h"

namespace token_shift {
namespace {

using dense::by_dtype;
using dense::data;
using dense::like;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vec::Float;
using vec::kLanes;
using Optional = std::optional<Tensor>;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def(kTokenShift1);
  m.def(kTokenShift1Backward);
  m.def(kTokenShift3);
  m.def(kTokenShift3Backward);
  m.def(kTokenShift6);
  m.def(kTokenShift6Backward);
}

template <class T>
Tensor dense_tensor(const Tensor& x, int64_t numel) {
  return dense::tensor<T>("token_shift", x, numel);
}

// x [B, T, C] as rows one after another; `document[row]` is the number of the document that starts there, -1 elsewhere.
template <class T>
struct Sequence {
  Tensor x;
  Optional last;
  int64_t rows, width, documents;
  std::vector<int64_t> document;

  Sequence(const Tensor& x_in, const Optional& last_in, const Optional& cu_seqlens) {
    STD_TORCH_CHECK(x_in.dim() == 3, "token_shift: x must be [B, T, C]");
    width = x_in.size(2), rows = x_in.size(0) * x_in.size(1);
    STD_TORCH_CHECK(width % kLanes == 0, "token_shift: C must be a multiple of ", kLanes);
    x = dense_tensor<T>(x_in, rows * width);
    STD_TORCH_CHECK(rows > 0, "token_shift: x must have a token at least");
    document.assign(rows, -1);
    if (cu_seqlens) {
      const Tensor held = torch::stable::contiguous(*cu_seqlens);
      STD_TORCH_CHECK(held.scalar_type() == ScalarType::Int && x_in.size(0) == 1, "token_shift: cu_seqlens must be int32, with B = 1");
      const auto* bounds = static_cast<const int32_t*>(held.const_data_ptr());
      documents = held.numel() - 1;
      STD_TORCH_CHECK(held.dim() == 1 && documents >= 1 && bounds[0] == 0 && bounds[documents] == rows,
                      "token_shift: cu_seqlens must run from 0 to T");
      for (int64_t d = 0; d < documents; ++d) {
        STD_TORCH_CHECK(bounds[d] >= 0 && bounds[d] <= bounds[d + 1] && bounds[d + 1] <= rows, "token_shift: cu_seqlens must ascend");
        if (bounds[d] < bounds[d + 1]) document[bounds[d]] = d;
      }
    } else {
      documents = x_in.size(0);
      for (int64_t d = 0; d < documents; ++d) document[d * x_in.size(1)] = d;
    }
    if (last_in) last = dense_tensor<T>(*last_in, documents * width);
  }

  // The row before `row`; `zeros` where a document starts from nothing.
  const T* before(int64_t row, const T* zeros) const {
    if (document[row] < 0) return data<T>(x) + (row - 1) * width;
    return last ? data<T>(*last) + document[row] * width : zeros;
  }
};

template <int kMixes, class T>
void forward(const Sequence<T>& s, const std::array<const T*, kMixes>& mix, const std::array<T*, kMixes>& out) {
  const std::vector<T> zeros(s.width);
  torch::stable::parallel_for(0, s.rows, 32, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *now = data<T>(s.x) + row * s.width, *before = s.before(row, zeros.data());
      for (int64_t c = 0; c < s.width; c += kLanes) {
        const Float x = vec::load(now + c), step = vec::load(before + c) - x;
#pragma GCC unroll 6
        for (int i = 0; i < kMixes; ++i) vec::store(out[i] + row * s.width + c, x + step * vec::load(mix[i] + c));
      }
    }
  });
}

constexpr int64_t kSumRows = 32;  // sums over tokens are closed every so many rows: shorter chains of additions lose less

template <int kMixes, class T>
void backward(const Sequence<T>& s, const std::array<const T*, kMixes>& mix, const std::array<const T*, kMixes>& d, T* dx, T* dlast,
              const std::array<T*, kMixes>& dmix) {
  const int64_t width = s.width, slices = dense::slices_of(s.rows);
  const std::vector<T> zeros(width);
  std::vector<float> sums(slices * kMixes * width);  // of each slice, added up in their order: equal at every run, on any number of threads
  torch::stable::parallel_for(0, slices, 1, [&](int64_t first_slice, int64_t last_slice) {
    std::vector<float> scratch((kMixes + 1) * width);
    for (int64_t slice = first_slice; slice < last_slice; ++slice) {
      const int64_t begin = s.rows * slice / slices, end = s.rows * (slice + 1) / slices;
      float *from_next = scratch.data(), *part = from_next + width, *sum = sums.data() + slice * kMixes * width;
      std::fill(from_next, from_next + width, 0.0f);
      if (end < s.rows && s.document[end] < 0)  // what the first row of the next slice gives back
        for (int64_t c = 0; c < width; c += kLanes) {
          Float back{};
          for (int i = 0; i < kMixes; ++i) back += vec::load(d[i] + end * width + c) * vec::load(mix[i] + c);
          vec::store(from_next + c, back);
        }
      for (int64_t last_row = end; last_row > begin; last_row -= kSumRows) {
        std::fill(part, part + kMixes * width, 0.0f);
        for (int64_t row = last_row - 1; row >= begin && row >= last_row - kSumRows; --row) {
          const T *now = data<T>(s.x) + row * width, *before = s.before(row, zeros.data());
          const int64_t document = s.document[row];
          for (int64_t c = 0; c < width; c += kLanes) {
            const Float step = vec::load(before + c) - vec::load(now + c);
            Float whole{}, back{};
#pragma GCC unroll 6
            for (int i = 0; i < kMixes; ++i) {
              const Float given = vec::load(d[i] + row * width + c);
              whole += given;
              back += given * vec::load(mix[i] + c);
              vec::store(part + i * width + c, vec::load(part + i * width + c) + given * step);
            }
            vec::store(dx + row * width + c, whole - back + vec::load(from_next + c));
            if (document >= 0) {
              if (dlast) vec::store(dlast + document * width + c, back);
              back = Float{};
            }
            vec::store(from_next + c, back);
          }
        }
        for (int64_t c = 0; c < kMixes * width; c += kLanes) vec::store(sum + c, vec::load(sum + c) + vec::load(part + c));
      }
    }
  });
  for (int i = 0; i < kMixes; ++i)
    for (int64_t c = 0; c < width; c += kLanes) {
      Float total{};
      for (int64_t slice = 0; slice < slices; ++slice) total += vec::load(&sums[(slice * kMixes + i) * width + c]);
      vec::store(dmix[i] + c, total);
    }
}

template <int kMixes, class T>
std::array<Tensor, kMixes> run_forward(const Tensor& x, const Optional& last, const Optional& cu_seqlens, const std::array<Tensor, kMixes>& mix) {
  const Sequence<T> s(x, last, cu_seqlens);
  std::array<Tensor, kMixes> mix_dense = mix, out = mix;
  std::array<const T*, kMixes> mix_at;
  std::array<T*, kMixes> out_at;
  for (int i = 0; i < kMixes; ++i) {
    mix_dense[i] = dense_tensor<T>(mix[i], s.width), mix_at[i] = data<T>(mix_dense[i]);
    out[i] = like(x), out_at[i] = data<T>(out[i]);
  }
  forward<kMixes, T>(s, mix_at, out_at);
  return out;
}

// dx, dlast and the gradients of the mixes
template <int kMixes, class T>
std::array<Tensor, kMixes + 2> run_backward(const std::array<Tensor, kMixes>& d, const Tensor& x, const Optional& last,
                                            const Optional& cu_seqlens, const std::array<Tensor, kMixes>& mix) {
  const Sequence<T> s(x, last, cu_seqlens);
  std::array<Tensor, kMixes> d_dense = d, mix_dense = mix;
  std::array<Tensor, kMixes + 2> out;
  std::array<const T*, kMixes> d_at, mix_at;
  std::array<T*, kMixes> dmix_at;
  for (int i = 0; i < kMixes; ++i) {
    d_dense[i] = dense_tensor<T>(d[i], s.rows * s.width), d_at[i] = data<T>(d_dense[i]);
    mix_dense[i] = dense_tensor<T>(mix[i], s.width), mix_at[i] = data<T>(mix_dense[i]);
    out[2 + i] = like(mix[i]), dmix_at[i] = data<T>(out[2 + i]);
  }
  out[0] = like(x);
  out[1] = torch::stable::new_zeros(x, {last ? s.documents : 0, s.width});
  backward<kMixes, T>(s, mix_at, d_at, data<T>(out[0]), last ? data<T>(out[1]) : nullptr, dmix_at);
  return out;
}

Tensor forward_1(Tensor x, Optional last, Optional cu_seqlens, Tensor mix) {
  return by_dtype(x, [&](auto* t) { return run_forward<1, std::remove_pointer_t<decltype(t)>>(x, last, cu_seqlens, {mix})[0]; });
}

std::tuple<Tensor, Tensor, Tensor> backward_1(Tensor d, Tensor x, Optional last, Optional cu_seqlens, Tensor mix) {
  const auto out = by_dtype(x, [&](auto* t) { return run_backward<1, std::remove_pointer_t<decltype(t)>>({d}, x, last, cu_seqlens, {mix}); });
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor> forward_3(Tensor x, Optional last, Optional cu_seqlens, Tensor r, Tensor k, Tensor v) {
  const auto out = by_dtype(x, [&](auto* t) { return run_forward<3, std::remove_pointer_t<decltype(t)>>(x, last, cu_seqlens, {r, k, v}); });
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_3(Tensor dr, Tensor dk, Tensor dv, Tensor x, Optional last, Optional cu_seqlens, Tensor r,
                                                              Tensor k, Tensor v) {
  const auto out = by_dtype(x, [&](auto* t) {
    return run_backward<3, std::remove_pointer_t<decltype(t)>>({dr, dk, dv}, x, last, cu_seqlens, {r, k, v});
  });
  return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_6(Tensor x, Optional last, Optional cu_seqlens, Tensor r, Tensor w, Tensor k,
                                                                     Tensor v, Tensor a, Tensor g) {
  const auto out = by_dtype(x, [&](auto* t) {
    return run_forward<6, std::remove_pointer_t<decltype(t)>>(x, last, cu_seqlens, {r, w, k, v, a, g});
  });
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_6(Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da,
                                                                                      Tensor dg, Tensor x, Optional last, Optional cu_seqlens,
                                                                                      Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g) {
  const auto out = by_dtype(x, [&](auto* t) {
    return run_backward<6, std::remove_pointer_t<decltype(t)>>({dr, dw, dk, dv, da, dg}, x, last, cu_seqlens, {r, w, k, v, a, g});
  });
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("token_shift_1", TORCH_BOX(&forward_1));
  m.impl("token_shift_1_backward", TORCH_BOX(&backward_1));
  m.impl("token_shift_3", TORCH_BOX(&forward_3));
  m.impl("token_shift_3_backward", TORCH_BOX(&backward_3));
  m.impl("token_shift_6", TORCH_BOX(&forward_6));
  m.impl("token_shift_6_backward", TORCH_BOX(&backward_6));
}

}  // namespace
}  // namespace token_shift
