// What a time mix does to each head of each token before and after its recurrence, on a CPU, each in one pass over memory.
// Gradients recompute what they need from the inputs. Rows are one head of one token, N wide; parameters are [C].
//
// before (time_mix_inputs):   rate = sigmoid(a0 + a);   kk = k k_k / max(|k k_k|, 1e-12)
//                             key = k (1 + (rate - 1) k_a);   remove = -kk;   replace = kk rate
//                             value = v + (v_first - v) sigmoid(v0 + residual)      (v in layer 0)
// after (time_mix_output):    out = (group_norm(y) weight + bias + (sum over the head of r k r_k) v) g
#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../elementwise.h"
#include "dense.h"

namespace time_mix {
namespace {

using dense::by_dtype;
using dense::data;
using dense::like;
using torch::stable::Tensor;
using vec::Float;
using vec::kLanes;
using vec::sigmoid;
using Optional = std::optional<Tensor>;

constexpr float kSmallestNorm = 1e-12f;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def(kTimeMixInputs);
  m.def(kTimeMixInputsBackward);
  m.def(kTimeMixOutput);
  m.def(kTimeMixOutputBackward);
}

Tensor nothing(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

// A dense tensor that is read: owns a copy where the caller's isn't dense. Null when there is none.
template <class T>
class In {
 public:
  In(const Tensor& x, int64_t numel) : held_(dense::tensor<T>("time_mix", x, numel)), at_(static_cast<const T*>(held_->const_data_ptr())) {}
  In(const Optional& x, int64_t numel) {
    if (x) held_ = dense::tensor<T>("time_mix", *x, numel), at_ = static_cast<const T*>(held_->const_data_ptr());
  }
  explicit operator bool() const { return at_ != nullptr; }
  Float operator()(int64_t i) const { return vec::load(at_ + i); }

 private:
  Optional held_;
  const T* at_ = nullptr;
};

template <class T>
class Out {
 public:
  explicit Out(const Tensor& x) : at_(static_cast<T*>(x.mutable_data_ptr())) {}
  void operator()(int64_t i, Float v) const { vec::store(at_ + i, v); }

 private:
  T* at_;
};

struct Rows {
  int64_t tokens, width, head;  // head: N

  Rows(const Tensor& x, int64_t head_size) : width(x.size(x.dim() - 1)), head(head_size) {
    STD_TORCH_CHECK(head >= kLanes && head % kLanes == 0, "time_mix: the head size must be a multiple of ", kLanes, ", got ", head);
    STD_TORCH_CHECK(width % head == 0, "time_mix: C must be a multiple of the head size ", head, ", got ", width);
    tokens = width ? x.numel() / width : 0;
  }
  int64_t numel() const { return tokens * width; }

  // run(at, c): the row at offset `at`, whose first channel is c
  template <class F>
  void each(const F& run) const {
    torch::stable::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        for (int64_t c = 0; c < width; c += head) run(token * width + c, c);
    });
  }

  // The same with sums over the tokens, of kSums rows of C channels each: add(i, c, x) adds to channels c ... of the i-th.
  // Slices of the tokens are added up in their order, so every run gives the same bits, on any number of threads; a slice's sums are closed
  // every 32 tokens, as shorter chains of additions lose less.
  template <class T, int kSums, class F>
  void each_with_sums(const std::array<T*, kSums>& sums, const F& run) const {
    const int64_t slices = dense::slices_of(tokens);
    std::vector<float> totals(slices * kSums * width);
    torch::stable::parallel_for(0, slices, 1, [&](int64_t first_slice, int64_t last_slice) {
      std::vector<float> part(kSums * width);
      auto add = [&](int i, int64_t c, Float x) { vec::store(&part[i * width + c], vec::load(&part[i * width + c]) + x); };
      for (int64_t slice = first_slice; slice < last_slice; ++slice) {
        float* total = totals.data() + slice * kSums * width;
        const int64_t end = tokens * (slice + 1) / slices;
        for (int64_t first = tokens * slice / slices; first < end; first += 32) {
          for (int64_t token = first; token < std::min(end, first + 32); ++token)
            for (int64_t c = 0; c < width; c += head) run(token * width + c, c, add);
          for (int64_t i = 0; i < kSums * width; i += kLanes) vec::store(total + i, vec::load(total + i) + vec::load(&part[i]));
          std::fill(part.begin(), part.end(), 0.0f);
        }
      }
    });
    for (int i = 0; i < kSums; ++i)
      for (int64_t c = 0; sums[i] && c < width; c += kLanes) {
        Float total{};
        for (int64_t slice = 0; slice < slices; ++slice) total += vec::load(&totals[(slice * kSums + i) * width + c]);
        vec::store(sums[i] + c, total);
      }
  }
};

// ---- before the recurrence --------------------------------------------------------------------------------------------------------

template <class T>
struct Inputs {
  Rows rows;
  In<T> k, v, a, v_first, residual, k_k, k_a, a0, v0;

  Inputs(const Tensor& k_, const Tensor& v_, const Tensor& a_, const Optional& v_first_, const Optional& residual_, const Tensor& k_k_,
         const Tensor& k_a_, const Tensor& a0_, const Optional& v0_, int64_t head_size)
      : rows(k_, head_size), k(k_, rows.numel()), v(v_, rows.numel()), a(a_, rows.numel()), v_first(v_first_, rows.numel()),
        residual(residual_, rows.numel()), k_k(k_k_, rows.width), k_a(k_a_, rows.width), a0(a0_, rows.width), v0(v0_, rows.width) {
    STD_TORCH_CHECK(bool(v_first) == bool(residual) && bool(v_first) == bool(v0), "time_mix: v_first, residual and v0 come together");
  }

  // 1 / max(|k k_k|, eps) of a row
  float inverse_norm(int64_t at, int64_t c) const {
    Float squares{};
    for (int64_t i = 0; i < rows.head; i += kLanes) {
      const Float x = k(at + i) * k_k(c + i);
      squares += x * x;
    }
    return 1.0f / std::max(std::sqrt(vec::sum(squares)), kSmallestNorm);
  }
};

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Four inputs(const Tensor& k, const Tensor& v, const Tensor& a, const Optional& v_first, const Optional& residual, const Tensor& k_k,
            const Tensor& k_a, const Tensor& a0, const Optional& v0, int64_t head_size) {
  const Inputs<T> in(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size);
  const Tensor key = like(k), value = in.v_first ? like(v) : nothing(v), remove = like(k), replace = like(k);
  const Out<T> to_key(key), to_value(value), to_remove(remove), to_replace(replace);
  in.rows.each([&](int64_t at, int64_t c) {
    const float inverse = in.inverse_norm(at, c);
    for (int64_t i = 0; i < in.rows.head; i += kLanes) {
      const Float k = in.k(at + i), rate = sigmoid(in.a0(c + i) + in.a(at + i)), kk = k * in.k_k(c + i) * inverse;
      to_key(at + i, k * (1.0f + (rate - 1.0f) * in.k_a(c + i)));
      to_remove(at + i, -kk);
      to_replace(at + i, kk * rate);
      if (in.v_first) {
        const Float v = in.v(at + i);
        to_value(at + i, v + (in.v_first(at + i) - v) * sigmoid(in.v0(c + i) + in.residual(at + i)));
      }
    }
  });
  return {key, value, remove, replace};
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Nine inputs_backward(const Tensor& dkey, const Tensor& dvalue, const Tensor& dremove, const Tensor& dreplace, const Tensor& k, const Tensor& v,
                     const Tensor& a, const Optional& v_first, const Optional& residual, const Tensor& k_k, const Tensor& k_a, const Tensor& a0,
                     const Optional& v0, int64_t head_size) {
  const Inputs<T> in(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size);
  const bool mixed = bool(in.v_first);
  const int64_t numel = in.rows.numel();
  const In<T> from_key(dkey, numel), from_remove(dremove, numel), from_replace(dreplace, numel), from_value(dvalue, mixed ? numel : 0);
  const Tensor dk = like(k), da = like(a), dk_k = like(k_k), dk_a = like(k_a), da0 = like(a0);
  const Tensor dv = mixed ? like(v) : nothing(v), dv_first = mixed ? like(v) : nothing(v), dresidual = mixed ? like(v) : nothing(v);
  const Tensor dv0 = mixed ? like(*v0) : nothing(v);
  const Out<T> to_k(dk), to_a(da), to_v(dv), to_v_first(dv_first), to_residual(dresidual);
  in.rows.template each_with_sums<T, 4>({data<T>(dk_k), data<T>(dk_a), data<T>(da0), mixed ? data<T>(dv0) : nullptr}, [&](int64_t at, int64_t c, auto& add) {
    const float inverse = in.inverse_norm(at, c);
    Float along{};  // sum of kk dkk
    for (int64_t i = 0; i < in.rows.head; i += kLanes) {
      const Float rate = sigmoid(in.a0(c + i) + in.a(at + i)), kk = in.k(at + i) * in.k_k(c + i) * inverse;
      along += kk * (from_replace(at + i) * rate - from_remove(at + i));
    }
    // where the norm is cut to its smallest value it has no gradient
    const float share = inverse < 1.0f / kSmallestNorm ? vec::sum(along) : 0.0f;
    for (int64_t i = 0; i < in.rows.head; i += kLanes) {
      const Float k = in.k(at + i), k_k = in.k_k(c + i), k_a = in.k_a(c + i), rate = sigmoid(in.a0(c + i) + in.a(at + i));
      const Float kk = k * k_k * inverse, dkey = from_key(at + i), dreplace = from_replace(at + i);
      const Float dunit = (dreplace * rate - from_remove(at + i) - kk * share) * inverse;
      const Float da = (dreplace * kk + dkey * k * k_a) * rate * (1.0f - rate);
      to_k(at + i, dkey * (1.0f + (rate - 1.0f) * k_a) + dunit * k_k);
      to_a(at + i, da);
      add(0, c + i, dunit * k);
      add(1, c + i, dkey * k * (rate - 1.0f));
      add(2, c + i, da);
      if (mixed) {
        const Float share_of_first = sigmoid(in.v0(c + i) + in.residual(at + i)), dvalue = from_value(at + i);
        const Float dfirst = dvalue * share_of_first;
        const Float dresidual = dfirst * (1.0f - share_of_first) * (in.v_first(at + i) - in.v(at + i));
        to_v(at + i, dvalue - dfirst);
        to_v_first(at + i, dfirst);
        to_residual(at + i, dresidual);
        add(3, c + i, dresidual);
      }
    }
  });
  return {dk, dv, da, dv_first, dresidual, dk_k, dk_a, da0, dv0};
}

// ---- after it ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct Outputs {
  Rows rows;
  In<T> y, r, k, v, g, r_k, weight, bias;
  float eps;

  Outputs(const Tensor& y_, const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& r_k_, const Tensor& weight_,
          const Tensor& bias_, double eps_, int64_t head_size)
      : rows(g_, head_size), y(y_, rows.numel()), r(r_, rows.numel()), k(k_, rows.numel()), v(v_, rows.numel()), g(g_, rows.numel()),
        r_k(r_k_, rows.width), weight(weight_, rows.width), bias(bias_, rows.width), eps(static_cast<float>(eps_)) {}

  struct Row {
    float mean, scale, bonus;  // of y: mean and 1 / standard deviation;  sum of r k r_k
  };
  Row row(int64_t at, int64_t c) const {
    Float sum{}, bonus{}, squares{};
    for (int64_t i = 0; i < rows.head; i += kLanes) {
      sum += y(at + i);
      bonus += r(at + i) * k(at + i) * r_k(c + i);
    }
    const float mean = vec::sum(sum) / rows.head;
    for (int64_t i = 0; i < rows.head; i += kLanes) {
      const Float off = y(at + i) - mean;
      squares += off * off;
    }
    return {mean, 1.0f / std::sqrt(vec::sum(squares) / rows.head + eps), vec::sum(bonus)};
  }
};

template <class T>
Tensor output(const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& r_k, const Tensor& weight,
              const Tensor& bias, double eps, int64_t head_size) {
  const Outputs<T> in(y, r, k, v, g, r_k, weight, bias, eps, head_size);
  const Tensor out = like(g);
  const Out<T> to(out);
  in.rows.each([&](int64_t at, int64_t c) {
    const auto row = in.row(at, c);
    for (int64_t i = 0; i < in.rows.head; i += kLanes) {
      const Float normal = (in.y(at + i) - row.mean) * row.scale;
      to(at + i, (normal * in.weight(c + i) + in.bias(c + i) + row.bonus * in.v(at + i)) * in.g(at + i));
    }
  });
  return out;
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Eight output_backward(const Tensor& dout, const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& r_k,
                      const Tensor& weight, const Tensor& bias, double eps, int64_t head_size) {
  const Outputs<T> in(y, r, k, v, g, r_k, weight, bias, eps, head_size);
  const In<T> from(dout, in.rows.numel());
  const Tensor dy = like(y), dr = like(r), dk = like(k), dv = like(v), dg = like(g), dr_k = like(r_k), dweight = like(weight), dbias = like(bias);
  const Out<T> to_y(dy), to_r(dr), to_k(dk), to_v(dv), to_g(dg);
  in.rows.template each_with_sums<T, 3>({data<T>(dr_k), data<T>(dweight), data<T>(dbias)}, [&](int64_t at, int64_t c, auto& add) {
    const auto row = in.row(at, c);
    Float along_v{}, sum{}, along_normal{};
    for (int64_t i = 0; i < in.rows.head; i += kLanes) {
      const Float dz = from(at + i) * in.g(at + i), dnormal = dz * in.weight(c + i), normal = (in.y(at + i) - row.mean) * row.scale;
      along_v += dz * in.v(at + i);
      sum += dnormal;
      along_normal += dnormal * normal;
    }
    const float dbonus = vec::sum(along_v), mean = vec::sum(sum) / in.rows.head, slope = vec::sum(along_normal) / in.rows.head;
    for (int64_t i = 0; i < in.rows.head; i += kLanes) {
      const Float d = from(at + i), dz = d * in.g(at + i), weight = in.weight(c + i), normal = (in.y(at + i) - row.mean) * row.scale;
      const Float r = in.r(at + i), k = in.k(at + i), v = in.v(at + i), r_k = in.r_k(c + i);
      to_g(at + i, d * (normal * weight + in.bias(c + i) + row.bonus * v));
      to_y(at + i, (dz * weight - mean - normal * slope) * row.scale);
      to_r(at + i, dbonus * k * r_k);
      to_k(at + i, dbonus * r * r_k);
      to_v(at + i, dz * row.bonus);
      add(0, c + i, dbonus * r * k);
      add(1, c + i, dz * normal);
      add(2, c + i, dz);
    }
  });
  return {dy, dr, dk, dv, dg, dr_k, dweight, dbias};
}

// ---- the ops ----------------------------------------------------------------------------------------------------------------------

Four inputs_op(Tensor k, Tensor v, Tensor a, Optional v_first, Optional residual, Tensor k_k, Tensor k_a, Tensor a0, Optional v0, int64_t head_size) {
  return by_dtype(k, [&](auto* t) {
    return inputs<std::remove_pointer_t<decltype(t)>>(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size);
  });
}
Nine inputs_backward_op(Tensor dkey, Tensor dvalue, Tensor dremove, Tensor dreplace, Tensor k, Tensor v, Tensor a, Optional v_first,
                        Optional residual, Tensor k_k, Tensor k_a, Tensor a0, Optional v0, int64_t head_size) {
  return by_dtype(k, [&](auto* t) {
    return inputs_backward<std::remove_pointer_t<decltype(t)>>(dkey, dvalue, dremove, dreplace, k, v, a, v_first, residual, k_k, k_a, a0, v0,
                                                               head_size);
  });
}
Tensor output_op(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, double eps, int64_t head_size) {
  return by_dtype(y, [&](auto* t) { return output<std::remove_pointer_t<decltype(t)>>(y, r, k, v, g, r_k, weight, bias, eps, head_size); });
}
Eight output_backward_op(Tensor dout, Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, double eps,
                         int64_t head_size) {
  return by_dtype(y, [&](auto* t) {
    return output_backward<std::remove_pointer_t<decltype(t)>>(dout, y, r, k, v, g, r_k, weight, bias, eps, head_size);
  });
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("time_mix_inputs", TORCH_BOX(&inputs_op));
  m.impl("time_mix_inputs_backward", TORCH_BOX(&inputs_backward_op));
  m.impl("time_mix_output", TORCH_BOX(&output_op));
  m.impl("time_mix_output_backward", TORCH_BOX(&output_backward_op));
}

}  // namespace
}  // namespace time_mix
