// One token for each of B sequences through the whole network, on a CPU, in one call.
//
// Such a step multiplies every matrix by B vectors only, so its time is that of reading the matrices from memory. Each is read
// once, front to back, a share of its rows by each thread; everything between two products is done on what is in the cache.
// The mathematics is that of TimeMix and ChannelMix (src/model/layers.py) at T = 1; arithmetic is fp32 for weights of every dtype.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#include "packed.h"
#include "vec.h"
#include "wkv7_cpu.h"

namespace decode {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vec::Bf16;
using vec::Float;
using vec::kLanes;
using vec::sigmoid;
using vec::sum;
using wkv7_cpu::kMaxLogDecay;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def(
      "decode_step(Tensor tokens, Tensor embedding, Tensor head, Tensor ends, Tensor[] layers, int w_rank, int a_rank, int g_rank, int v_rank,"
      " Tensor(a!) att_shift, Tensor(b!) wkv, Tensor(c!) ffn_shift) -> Tensor logits");
}

// ---- what a layer is made of; src/ops/decode.py lays it out ------------------------------------------------------------------------

enum Vector {  // rows of a layer's `vectors`, fp32
  LN1_WEIGHT, LN1_BIAS, LN2_WEIGHT, LN2_BIAS, X_R, X_K, X_V, X_W, X_A, X_G, W0, A0, V0, K_K, K_A, R_K, LN_X_WEIGHT, LN_X_BIAS, FFN_X_K, VECTORS
};
enum LayerTensor { VECTOR_ROWS, INNER, OUTER, RECEPTANCE, KEY, VALUE, OUTPUT, FFN_KEY, FFN_VALUE, MATRICES };
enum Ends { LN0_WEIGHT, LN0_BIAS, LN_OUT_WEIGHT, LN_OUT_BIAS, ENDS };

constexpr float kLayerNormEps = 1e-5f, kGroupNormEps = 64e-5f, kKeyNormEps = 1e-12f;
constexpr int64_t kMostN = 256;  // the largest head size

// ---- vectors ------------------------------------------------------------------------------------------------------------------------

template <class F>
inline void each(int64_t n, const F& f) {
  for (int64_t c = 0; c < n; c += kLanes) f(c);
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias over n values; out may be x.
void normalise(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* out) {
  Float total{}, squares{};
  each(n, [&](int64_t c) { total += vec::load(x + c); });
  const float mean = sum(total) / n;
  each(n, [&](int64_t c) {
    const Float d = vec::load(x + c) - mean;
    squares += d * d;
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
  each(n, [&](int64_t c) { vec::store(out + c, (vec::load(x + c) - mean) * scale * vec::load(weight + c) + vec::load(bias + c)); });
}

// ---- products with matrices -----------------------------------------------------------------------------------------------------------

// fp32, bf16 or packed (packed.h), row after row; `first` is the row that it begins with.
struct Matrix {
  const void* data;
  ScalarType dtype;  // packed: uint8
  int64_t first;

  explicit Matrix(const Tensor& t, int64_t row = 0) : data(t.const_data_ptr()), dtype(t.scalar_type()), first(row) {}
};

// out[b, row] = weight[row] . x[b] for b < B; all rows of one multiplication have the same length.
struct Product {
  Matrix weight;
  int64_t rows;
  const float* x;
  float* out;
  int64_t out_stride;  // from one sequence's to the next one's
};

// A thread walks through its rows in several places at once: a processor that looks ahead in several pages of memory gets more out of it
// than in one (on the machine where this was tried, 22 GB/s instead of 16). As many as their sums for four sequences have registers.
constexpr int kStreams = vec::kRegisters >= 32 ? 6 : 4;
constexpr int64_t kAhead = 2048;         // bytes between what is read and what is asked for: across a page's end, where it stops looking ahead
constexpr int64_t kLeastWork = 1 << 15;  // weights that are worth a thread

// kRows rows, `apart` from each other, times the vectors of kB sequences.
template <int kRows, int kB, class T>
inline void dots(const T* row, int64_t apart, const float* x, int64_t columns, float* out, int64_t out_apart, int64_t out_stride) {
  Float total[kRows][kB] = {};
  each(columns, [&](int64_t c) {
    Float weight[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const T* at = row + r * apart + c;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead, 0, 3);
      weight[r] = vec::load(at);
    }
#pragma GCC unroll 6
    for (int b = 0; b < kB; ++b) {
      const Float value = vec::load(x + b * columns + c);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) total[r][b] += weight[r] * value;
    }
  });
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kB; ++b) out[r * out_apart + b * out_stride] = sum(total[r][b]);
}

template <int kRows, class T>
inline void dots_of_all(const T* row, int64_t apart, const Product& p, int64_t columns, int64_t B, float* out, int64_t out_apart) {
  int64_t b = 0;
  for (; b + 4 <= B; b += 4) dots<kRows, 4>(row, apart, p.x + b * columns, columns, out + b * p.out_stride, out_apart, p.out_stride);
  for (; b < B; ++b) dots<kRows, 1>(row, apart, p.x + b * columns, columns, out + b * p.out_stride, out_apart, p.out_stride);
}

template <class T>
void rows_times(const Product& p, int64_t first, int64_t last, int64_t columns, int64_t B) {
  const T* weight = static_cast<const T*>(p.weight.data) + p.weight.first * columns;
  const int64_t share = (last - first) / kStreams;
  for (int64_t row = first; row < first + share; ++row)
    dots_of_all<kStreams>(weight + row * columns, share * columns, p, columns, B, p.out + row, share);
  // The rest by the same code, each row kStreams times: another loop may be compiled to products and sums that round otherwise, and which
  // rows are left over depends on the number of threads.
  for (int64_t row = first + kStreams * share; row < last; ++row) dots_of_all<kStreams>(weight + row * columns, 0, p, columns, B, p.out + row, 0);
}

#if defined(PACKED_PAYS)
// kRows packed rows, `apart` from each other, times one vector.
template <int kRows>
inline void packed_dots(const packed::Rows& rows, int64_t row, int64_t apart, const float* x, int64_t columns, float* out) {
  Float total[kRows] = {};
  const packed::Unpack unpack(rows.base);
  const uint8_t* group = rows.data + row * rows.bytes;
  for (int64_t c = 0; c < columns; c += packed::kGroup, group += packed::kGroupBytes) {
#pragma GCC unroll 4
    for (int part = 0; part < packed::Unpack::kParts; ++part)
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* at = group + r * apart * rows.bytes;
        for (int64_t line = 0; part == 0 && line < packed::kGroupBytes; line += vec::kLine) __builtin_prefetch(at + line + kAhead, 0, 3);
        Float weight[packed::Unpack::kVectors];
        unpack(at, part, weight);
#pragma GCC unroll 4
        for (int v = 0; v < packed::Unpack::kVectors; ++v) total[r] += weight[v] * vec::load(x + c + packed::Unpack::column(part, v));
      }
  }
  for (int r = 0; r < kRows; ++r) out[r * apart] = sum(total[r]) + rows.exceptions_times(row + r * apart, x);
}

// For a single sequence: for several ones the unpacking would take longer than the reading.
void packed_rows_times(const Product& p, int64_t first, int64_t last, int64_t columns, int64_t B) {
  const packed::Rows rows(p.weight.data, p.weight.first + first);
  const int64_t count = last - first, share = count / kStreams;
  for (int64_t b = 0; b < B; ++b) {
    const float* x = p.x + b * columns;
    float* out = p.out + b * p.out_stride + first;
    for (int64_t row = 0; row < share; ++row) packed_dots<kStreams>(rows, row, share, x, columns, out + row);
    for (int64_t row = kStreams * share; row < count; ++row) packed_dots<kStreams>(rows, row, 0, x, columns, out + row);  // as in rows_times
  }
}
#endif

// ---- the network ------------------------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t B, C, H, N, F, V;       // F: width of the channel mix
  int64_t w_rank, a_rank, g_rank, v_rank;
  int64_t ranks() const { return w_rank + a_rank + g_rank + v_rank; }
};

// T: the dtype of the embedding and of the token shifts' states.
template <class T>
class Step {
 public:
  Step(const Sizes& sizes, const Tensor& like)
      : s_(sizes), memory_(torch::stable::new_empty(like, {s_.B * (13 * s_.C + s_.ranks() + s_.F) + 16}, ScalarType::Float)) {
    next_ = static_cast<float*>(memory_.mutable_data_ptr());
    const int64_t row = s_.B * s_.C;
    x_ = take(row), normed_ = take(row), mixed_ = take(6 * row), r_ = take(row), k_ = take(row), v_ = take(row);
    v_first_ = take(row), y_ = take(row), inner_ = take(s_.B * s_.ranks()), hidden_ = take(s_.B * s_.F);
  }

  void embed(const int64_t* tokens, const T* embedding, const float* ends) {
    for (int64_t b = 0; b < s_.B; ++b) {
      float* x = x_ + b * s_.C;
      each(s_.C, [&](int64_t c) { vec::store(x + c, vec::load(embedding + tokens[b] * s_.C + c)); });
      normalise(x, s_.C, kLayerNormEps, ends + LN0_WEIGHT * s_.C, ends + LN0_BIAS * s_.C, x);
    }
  }

  void layer(int64_t number, const Tensor* tensors, T* att_shift, float* wkv, T* ffn_shift) {
    const auto* vectors = static_cast<const float*>(tensors[VECTOR_ROWS].const_data_ptr());
    time_mix(number, vectors, tensors, att_shift, wkv);
    channel_mix(vectors, tensors, ffn_shift);
  }

  void logits(const Tensor& head, const float* ends, float* out) {
    for (int64_t b = 0; b < s_.B; ++b)
      normalise(x_ + b * s_.C, s_.C, kLayerNormEps, ends + LN_OUT_WEIGHT * s_.C, ends + LN_OUT_BIAS * s_.C, normed_ + b * s_.C);
    multiply({{Matrix(head), s_.V, normed_, out, s_.V}}, s_.C);
  }

 private:
  float* take(int64_t floats) {
    float* p = next_;
    next_ += (floats + 15) / 16 * 16;
    return p;
  }

  // Every thread takes an equal share of all the products' rows.
  void multiply(const std::vector<Product>& products, int64_t columns) {
    int64_t rows = 0;
    for (const Product& p : products) rows += p.rows;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kLeastWork / columns), [&](int64_t begin, int64_t end) {
      const vec::FlushDenormals guard;
      for (const Product& p : products) {
        if (begin < p.rows && end > 0) {
          const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, p.rows);
          auto times = p.weight.dtype == ScalarType::BFloat16 ? rows_times<Bf16> : rows_times<float>;
#if defined(PACKED_PAYS)
          if (p.weight.dtype == ScalarType::Byte) times = packed_rows_times;
#endif
          times(p, first, last, columns, s_.B);
        }
        begin -= p.rows, end -= p.rows;
      }
    });
  }

  // normed = norm(x), mixed[i] = normed + (shift - normed) * mixes[i]; then shift = normed.
  void shift_and_mix(const float* weight, const float* bias, const float* mixes, int64_t count, T* shift) {
    const int64_t C = s_.C;
    for (int64_t b = 0; b < s_.B; ++b) {
      float* normed = normed_ + b * C;
      normalise(x_ + b * C, C, kLayerNormEps, weight, bias, normed);
      each(C, [&](int64_t c) {
        const Float now = vec::load(normed + c), difference = vec::load(shift + b * C + c) - now;
        vec::store(shift + b * C + c, now);
        for (int64_t i = 0; i < count; ++i)
          vec::store(mixed_ + (i * s_.B + b) * C + c, now + difference * vec::load(mixes + i * C + c));
      });
    }
  }

  void add_to_x(const float* out) {
    each(s_.B * s_.C, [&](int64_t c) { vec::store(x_ + c, vec::load(x_ + c) + vec::load(out + c)); });
  }

  void time_mix(int64_t number, const float* vectors, const Tensor* tensors, T* shift, float* wkv) {
    const int64_t B = s_.B, C = s_.C, ranks = s_.ranks();
    auto vector = [&](Vector which) { return vectors + which * C; };
    auto mixed = [&](Vector which) { return mixed_ + (which - X_R) * B * C; };
    shift_and_mix(vector(LN1_WEIGHT), vector(LN1_BIAS), vector(X_R), 6, shift);

    std::vector<Product> products = {{Matrix(tensors[RECEPTANCE]), C, mixed(X_R), r_, C},
                                     {Matrix(tensors[KEY]), C, mixed(X_K), k_, C},
                                     {Matrix(tensors[VALUE]), C, mixed(X_V), v_, C}};
    int64_t rank = 0;
    for (auto [which, rows] : {std::pair{X_W, s_.w_rank}, {X_A, s_.a_rank}, {X_G, s_.g_rank}, {X_V, number == 0 ? 0 : s_.v_rank}}) {
      products.push_back({Matrix(tensors[INNER], rank), rows, mixed(which), inner_ + rank, ranks});
      rank += rows;
    }
    multiply(products, C);
    if (number == 0) std::memcpy(v_first_, v_, sizeof(float) * B * C);
    for (int64_t b = 0; b < B; ++b) {
      float* low = inner_ + b * ranks;
      for (int64_t d = 0; d < s_.w_rank; ++d) low[d] = std::tanh(low[d]);
      for (int64_t d = s_.w_rank + s_.a_rank; d < s_.w_rank + s_.a_rank + s_.g_rank; ++d) low[d] = 1.0f / (1.0f + std::exp(-low[d]));
    }
    torch::stable::parallel_for(0, s_.H, 1, [&](int64_t begin, int64_t end) {
      const vec::FlushDenormals guard;
      for (int64_t head = begin; head < end; ++head)
        for (int64_t b = 0; b < B; ++b) one_head(number, head, b, vectors, tensors[OUTER], wkv);
    });
    multiply({{Matrix(tensors[OUTPUT]), C, y_, normed_, C}}, C);
    add_to_x(normed_);
  }

  // out[c] = sum over d of low[d] * matrix[d, c], matrix [rank, N].
  template <class M>
  void low_rank(const float* low, int64_t rank, const M* matrix, float* out) const {
    const int64_t N = s_.N;
    each(N, [&](int64_t c) {
      Float total[4] = {};
      int64_t d = 0;
      for (; d + 4 <= rank; d += 4)
#pragma GCC unroll 4
        for (int chain = 0; chain < 4; ++chain) total[chain] += low[d + chain] * vec::load(matrix + (d + chain) * N + c);
      for (; d < rank; ++d) total[0] += low[d] * vec::load(matrix + d * N + c);
      vec::store(out + c, (total[0] + total[1]) + (total[2] + total[3]));
    });
  }

  // From r, k, v and the inner low-rank products to y = (group norm of the recurrence's output + bonus) * gate, for one head of a sequence.
  void one_head(int64_t number, int64_t head, int64_t b, const float* vectors, const Tensor& outer, float* wkv) {
    const int64_t N = s_.N, at = b * s_.C + head * N;
    auto vector = [&](Vector which, int64_t c) { return vec::load(vectors + which * s_.C + head * N + c); };
    float *r = r_ + at, *k = k_ + at, *v = v_ + at, *y = y_ + at, *S = wkv + (b * s_.H + head) * N * N;
    alignas(64) float decay[kMostN], rate[kMostN], gate[kMostN], residual[kMostN], remove[kMostN];
    const float* low = inner_ + b * s_.ranks();
    int64_t from = head * s_.ranks() * N;
    for (auto [rank, out] : {std::pair{s_.w_rank, decay}, {s_.a_rank, rate}, {s_.g_rank, gate}, {number == 0 ? 0 : s_.v_rank, residual}}) {
      const void* matrix = outer.const_data_ptr();
      outer.scalar_type() == ScalarType::BFloat16 ? low_rank(low, rank, static_cast<const Bf16*>(matrix) + from, out)
                                                  : low_rank(low, rank, static_cast<const float*>(matrix) + from, out);
      low += rank, from += rank * N;
    }

    Float squares{}, bonus{};
    each(N, [&](int64_t c) {
      const Float a = sigmoid(vector(A0, c) + vec::load(rate + c)), key = vec::load(k + c), kk = key * vector(K_K, c);
      const Float kept = key * (1.0f + (a - 1.0f) * vector(K_A, c));
      squares += kk * kk;
      bonus += vec::load(r + c) * kept * vector(R_K, c);
      vec::store(decay + c, vec::exp(-kMaxLogDecay * sigmoid(vector(W0, c) + vec::load(decay + c))));
      vec::store(remove + c, kk), vec::store(rate + c, a), vec::store(k + c, kept);
      if (number == 0) return;
      const Float value = vec::load(v + c), first = vec::load(v_first_ + at + c);
      vec::store(v + c, value + (first - value) * sigmoid(vector(V0, c) + vec::load(residual + c)));
    });
    const float length = 1.0f / std::max(std::sqrt(sum(squares)), kKeyNormEps), extra = sum(bonus);
    each(N, [&](int64_t c) {
      const Float kk = vec::load(remove + c) * length;
      vec::store(remove + c, -kk), vec::store(rate + c, kk * vec::load(rate + c));
    });

    for (int64_t i = 0; i < N; ++i, S += N) {  // a row of the state: one value, all keys
      Float sa{}, out{};
      each(N, [&](int64_t c) { sa += vec::load(S + c) * vec::load(remove + c); });
      const float removed = sum(sa), value = v[i];
      each(N, [&](int64_t c) {
        const Float now = vec::load(S + c) * vec::load(decay + c) + removed * vec::load(rate + c) + value * vec::load(k + c);
        vec::store(S + c, now);
        out += now * vec::load(r + c);
      });
      y[i] = sum(out);
    }
    normalise(y, N, kGroupNormEps, vectors + LN_X_WEIGHT * s_.C + head * N, vectors + LN_X_BIAS * s_.C + head * N, y);
    each(N, [&](int64_t c) { vec::store(y + c, (vec::load(y + c) + extra * vec::load(v + c)) * vec::load(gate + c)); });
  }

  void channel_mix(const float* vectors, const Tensor* tensors, T* shift) {
    const int64_t C = s_.C, F = s_.F;
    shift_and_mix(vectors + LN2_WEIGHT * C, vectors + LN2_BIAS * C, vectors + FFN_X_K * C, 1, shift);
    multiply({{Matrix(tensors[FFN_KEY]), F, mixed_, hidden_, F}}, C);
    each(s_.B * F, [&](int64_t c) {
      const Float k = vec::load(hidden_ + c), positive = k < 0.0f ? Float{} : k;
      vec::store(hidden_ + c, positive * positive);
    });
    multiply({{Matrix(tensors[FFN_VALUE]), C, hidden_, normed_, C}}, F);
    add_to_x(normed_);
  }

  const Sizes s_;
  Tensor memory_;
  float *next_, *x_, *normed_, *mixed_, *r_, *k_, *v_, *v_first_, *y_, *inner_, *hidden_;
};

// ---- the op -----------------------------------------------------------------------------------------------------------------------------

void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() == static_cast<int64_t>(shape.size()), "decode_step: ", name,
                  " has another number of dimensions or layout than expected");
  int64_t d = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(x.size(d) == size, "decode_step: ", name, " must have size ", size, " in dimension ", d, ", got ", x.size(d));
    ++d;
  }
}

// As check, for a state: its layers may lie further apart than B rows take, as where there is memory for more sequences than B.
void check_state(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "decode_step: ", name, " has another dtype than expected");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), "decode_step: ", name, " has another number of dimensions than expected");
  int64_t dense = 1;
  for (int64_t d = x.dim() - 1; d >= 0; dense *= x.size(d), --d) {
    const int64_t size = shape.begin()[d];
    STD_TORCH_CHECK(x.size(d) == size, "decode_step: ", name, " must have size ", size, " in dimension ", d, ", got ", x.size(d));
    const bool in_place = d == 0 ? x.stride(0) >= dense : x.stride(d) == dense;
    STD_TORCH_CHECK(in_place || x.size(d) == 1, "decode_step: ", name, " has another layout than expected");
  }
}

void check(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "decode_step: ", name, " has another dtype than expected");
  check_shape(x, name, shape);
}
void check_plain(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "decode_step: ", name, " must be float32 or bfloat16");
  check_shape(x, name, shape);
}
void check_matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  if (x.scalar_type() != ScalarType::Byte) return check_plain(x, name, {rows, columns});
#if !defined(PACKED_PAYS)
  STD_TORCH_CHECK(false, "decode_step: ", name, " is packed, which this processor's instruction set has no reader for");
#endif
  packed::Header header{};
  const bool whole = x.is_contiguous() && x.numel() >= static_cast<int64_t>(sizeof header);
  if (whole) std::memcpy(&header, x.const_data_ptr(), sizeof header);
  STD_TORCH_CHECK(whole && header.rows == rows && header.columns == columns && x.numel() == packed::total_bytes(rows, columns, header.exceptions),
                  "decode_step: ", name, " was packed from another matrix than one of ", rows, " x ", columns);
}

int64_t rows_of(const Tensor& matrix) {
  if (matrix.scalar_type() != ScalarType::Byte) return matrix.dim() > 0 ? matrix.size(0) : 0;
  packed::Header header{};
  if (matrix.numel() >= static_cast<int64_t>(sizeof header)) std::memcpy(&header, matrix.const_data_ptr(), sizeof header);
  return header.rows;
}

template <class T>
Tensor run(const Sizes& s, const Tensor& tokens, const Tensor& embedding, const Tensor& head, const Tensor& ends,
           const std::vector<Tensor>& layers, const Tensor& att_shift, const Tensor& wkv, const Tensor& ffn_shift) {
  const vec::FlushDenormals guard;
  const Tensor logits = torch::stable::new_empty(head, {s.B, s.V}, ScalarType::Float);
  const auto* both_ends = static_cast<const float*>(ends.const_data_ptr());
  Step<T> step(s, head);
  step.embed(static_cast<const int64_t*>(tokens.const_data_ptr()), static_cast<const T*>(embedding.const_data_ptr()), both_ends);
  auto* att = static_cast<T*>(att_shift.mutable_data_ptr());
  auto* ffn = static_cast<T*>(ffn_shift.mutable_data_ptr());
  auto* states = static_cast<float*>(wkv.mutable_data_ptr());
  const int64_t count = static_cast<int64_t>(layers.size()) / MATRICES;
  for (int64_t i = 0; i < count; ++i, att += att_shift.stride(0), ffn += ffn_shift.stride(0), states += wkv.stride(0))
    step.layer(i, layers.data() + i * MATRICES, att, states, ffn);
  step.logits(head, both_ends, static_cast<float*>(logits.mutable_data_ptr()));
  return logits;
}

Tensor decode_step(Tensor tokens, Tensor embedding, Tensor head, Tensor ends, std::vector<Tensor> layers, int64_t w_rank, int64_t a_rank,
                   int64_t g_rank, int64_t v_rank, Tensor att_shift, Tensor wkv, Tensor ffn_shift) {
  STD_TORCH_CHECK(!layers.empty() && layers.size() % MATRICES == 0, "decode_step: needs ", int(MATRICES), " tensors a layer");
  STD_TORCH_CHECK(tokens.dim() == 1 && embedding.dim() == 2 && wkv.dim() == 5, "decode_step: tokens, embedding or wkv has another number of dimensions");
  const auto L = static_cast<int64_t>(layers.size()) / MATRICES;
  const Sizes s{tokens.size(0), embedding.size(1), wkv.size(2), wkv.size(3), rows_of(layers[FFN_KEY]), embedding.size(0), w_rank, a_rank, g_rank, v_rank};
  const bool sizes_fit = s.B >= 1 && s.C >= 1 && s.H * s.N == s.C && s.N % 16 == 0 && s.N <= kMostN && s.F >= 1 && s.F % 16 == 0;
  STD_TORCH_CHECK(sizes_fit && std::min({w_rank, a_rank, g_rank, v_rank}) >= 0, "decode_step: unfit sizes");
  const auto dtype = embedding.scalar_type(), f32 = ScalarType::Float;
  check(tokens, "tokens", ScalarType::Long, {s.B});
  check_plain(embedding, "embedding", {s.V, s.C});
  check_matrix(head, "head", s.V, s.C);
  check(ends, "ends", f32, {ENDS, s.C});
  check_state(att_shift, "att_shift", dtype, {L, s.B, s.C});
  check_state(ffn_shift, "ffn_shift", dtype, {L, s.B, s.C});
  check_state(wkv, "wkv", f32, {L, s.B, s.H, s.N, s.N});
  for (int64_t i = 0; i < L; ++i) {
    const Tensor* layer = layers.data() + i * MATRICES;
    check(layer[VECTOR_ROWS], "vectors", f32, {VECTORS, s.C});
    check_matrix(layer[INNER], "inner", s.ranks(), s.C);
    check_plain(layer[OUTER], "outer", {s.H, s.ranks(), s.N});
    for (int m : {RECEPTANCE, KEY, VALUE, OUTPUT}) check_matrix(layer[m], "a matrix of the time mix", s.C, s.C);
    check_matrix(layer[FFN_KEY], "ffn key", s.F, s.C);
    check_matrix(layer[FFN_VALUE], "ffn value", s.C, s.F);
  }
  const auto* ids = static_cast<const int64_t*>(tokens.const_data_ptr());
  for (int64_t b = 0; b < s.B; ++b)
    STD_TORCH_CHECK(ids[b] >= 0 && ids[b] < s.V, "decode_step: token id ", ids[b], " is outside the vocabulary of ", s.V);
  return dtype == f32 ? run<float>(s, tokens, embedding, head, ends, layers, att_shift, wkv, ffn_shift)
                      : run<Bf16>(s, tokens, embedding, head, ends, layers, att_shift, wkv, ffn_shift);
}

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace
}  // namespace decode
