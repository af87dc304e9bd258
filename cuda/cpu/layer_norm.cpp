// Layer norm of a sum on a CPU, in one pass over memory; x, added and out [rows, C]:
//
//   sum = x + added;   out = (sum - mean) / sqrt(variance + eps) weight + bias
//   backward:  n = the normalised sum,  d = dout weight:   dsum += (d - mean of d - n mean of d n) / sqrt(variance + eps)
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "dense.h"

namespace layer_norm {
namespace {

using dense::data;
using dense::like;
using torch::stable::Tensor;
using vec::Float;
using vec::kLanes;
using Optional = std::optional<Tensor>;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("add_layer_norm(Tensor x, Tensor? added, Tensor weight, Tensor bias, float eps) -> (Tensor sum, Tensor out)");
  m.def(
      "add_layer_norm_backward(Tensor? dsum, Tensor dout, Tensor sum, Tensor weight, float eps) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

constexpr int64_t kSumRows = 32;  // sums over rows are closed every so many rows: shorter chains of additions lose less

template <class T>
Tensor held(const Tensor& x, int64_t numel) {
  return dense::tensor<T>("add_layer_norm", x, numel);
}

void check_width(int64_t width) { STD_TORCH_CHECK(width > 0 && width % kLanes == 0, "add_layer_norm: C must be a multiple of ", kLanes); }

struct Normal {
  float mean, scale;  // scale: 1 / sqrt(variance + eps)
};
template <class T>
Normal normal(const T* row, int64_t width, float eps) {
  Float sum{}, squares{};
  for (int64_t c = 0; c < width; c += kLanes) sum += vec::load(row + c);
  const float mean = vec::sum(sum) / width;
  for (int64_t c = 0; c < width; c += kLanes) {
    const Float off = vec::load(row + c) - mean;
    squares += off * off;
  }
  return {mean, 1.0f / std::sqrt(vec::sum(squares) / width + eps)};
}

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& x_in, const Optional& added_in, const Tensor& weight_in, const Tensor& bias_in, double eps) {
  const int64_t width = x_in.size(x_in.dim() - 1), rows = x_in.numel() / width;
  check_width(width);
  const Tensor x = held<T>(x_in, rows * width), weight = held<T>(weight_in, width), bias = held<T>(bias_in, width), out = like(x);
  Optional added;
  if (added_in) added = held<T>(*added_in, rows * width);
  // An output may not be an input: without `added` the sum is empty.
  const Tensor sum = added ? like(x) : torch::stable::new_empty(x, {0});
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    const T *w = data<T>(weight), *b = data<T>(bias);
    for (int64_t row = begin; row < end; ++row) {
      const T* from = data<T>(x) + row * width;
      if (added) {
        const T* other = data<T>(*added) + row * width;
        T* to_sum = data<T>(sum) + row * width;
        for (int64_t c = 0; c < width; c += kLanes) vec::store(to_sum + c, vec::load(from + c) + vec::load(other + c));
        from = to_sum;
      }
      const Normal n = normal(from, width, static_cast<float>(eps));
      T* to = data<T>(out) + row * width;
      for (int64_t c = 0; c < width; c += kLanes)
        vec::store(to + c, (vec::load(from + c) - n.mean) * n.scale * vec::load(w + c) + vec::load(b + c));
    }
  });
  return {sum, out};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Optional& dsum_in, const Tensor& dout_in, const Tensor& sum_in, const Tensor& weight_in,
                                                double eps) {
  const int64_t width = sum_in.size(sum_in.dim() - 1), rows = sum_in.numel() / width, slices = dense::slices_of(rows);
  check_width(width);
  const Tensor dout = held<T>(dout_in, rows * width), sum = held<T>(sum_in, rows * width), weight = held<T>(weight_in, width);
  const Tensor dx = like(sum), dweight = like(weight), dbias = like(weight);
  Optional dsum;
  if (dsum_in) dsum = held<T>(*dsum_in, rows * width);
  std::vector<float> sums(slices * 2 * width);  // of each slice, added up in their order: equal at every run, on any number of threads
  torch::stable::parallel_for(0, slices, 1, [&](int64_t first_slice, int64_t last_slice) {
    std::vector<float> part(2 * width);
    float *part_weight = part.data(), *part_bias = part_weight + width;
    const T* w = data<T>(weight);
    for (int64_t slice = first_slice; slice < last_slice; ++slice) {
      float* total = sums.data() + slice * 2 * width;
      const int64_t end = rows * (slice + 1) / slices;
      for (int64_t first = rows * slice / slices; first < end; first += kSumRows) {
        for (int64_t row = first; row < std::min(end, first + kSumRows); ++row) {
          const T *d = data<T>(dout) + row * width, *x = data<T>(sum) + row * width, *more = dsum ? data<T>(*dsum) + row * width : nullptr;
          T* to = data<T>(dx) + row * width;
          const Normal n = normal(x, width, static_cast<float>(eps));
          Float along_one{}, along_normal{};
          for (int64_t c = 0; c < width; c += kLanes) {
            const Float given = vec::load(d + c), dnormal = given * vec::load(w + c), unit = (vec::load(x + c) - n.mean) * n.scale;
            along_one += dnormal;
            along_normal += dnormal * unit;
            vec::store(part_weight + c, vec::load(part_weight + c) + given * unit);
            vec::store(part_bias + c, vec::load(part_bias + c) + given);
          }
          const float mean = vec::sum(along_one) / width, slope = vec::sum(along_normal) / width;
          for (int64_t c = 0; c < width; c += kLanes) {
            const Float unit = (vec::load(x + c) - n.mean) * n.scale;
            const Float change = (vec::load(d + c) * vec::load(w + c) - mean - unit * slope) * n.scale;
            vec::store(to + c, more ? vec::load(more + c) + change : change);
          }
        }
        for (int64_t i = 0; i < 2 * width; i += kLanes) vec::store(total + i, vec::load(total + i) + vec::load(&part[i]));
        std::fill(part.begin(), part.end(), 0.0f);
      }
    }
  });
  for (int64_t c = 0; c < width; c += kLanes)
    for (int i = 0; i < 2; ++i) {
      Float total{};
      for (int64_t slice = 0; slice < slices; ++slice) total += vec::load(&sums[(slice * 2 + i) * width + c]);
      vec::store(data<T>(i == 0 ? dweight : dbias) + c, total);
    }
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor> forward(Tensor x, Optional added, Tensor weight, Tensor bias, double eps) {
  return dense::by_dtype(x, [&](auto* t) { return run<std::remove_pointer_t<decltype(t)>>(x, added, weight, bias, eps); });
}
std::tuple<Tensor, Tensor, Tensor> backward(Optional dsum, Tensor dout, Tensor sum, Tensor weight, double eps) {
  return dense::by_dtype(sum, [&](auto* t) { return run_backward<std::remove_pointer_t<decltype(t)>>(dsum, dout, sum, weight, eps); });
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace layer_norm
