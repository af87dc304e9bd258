// Products of bf16 activations and weights by a CPU's matrix units (AMX):  out [T, N] = x [T, K] w,  summed in fp32, rounded once.
//
// A thread takes a panel of w's columns, packs it into its second cache level, and multiplies it with its rows of x, 32 at a time, of which the
// next ones are fetched meanwhile. Every sum is made in the same order on any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>

#include "matrix_units.h"

namespace product {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("product(Tensor x, Tensor weight, bool turned) -> Tensor");  // turned: weight is [N, K], as nn.Linear has it; else [K, N]
}

#ifdef MATRIX_UNITS

using namespace matrix_units;

constexpr int64_t kStreamed = 1 << 18;  // numbers of a product that isn't in the caches any more when it is read

// Columns of w that a thread packs at a time: as few bytes as possible are packed by all threads together, of w and of x, while a panel stays in
// the cache.
int64_t panel_width(int64_t T, int64_t K, int64_t N, int64_t threads) {
  const auto balanced = static_cast<int64_t>(std::sqrt(static_cast<double>(N) * T / threads));
  const int64_t fits = std::max<int64_t>(1, kPanel / (in_units(K, kStep) * kStep * kBlock));
  return std::clamp<int64_t>(in_units(balanced, kBlock), 1, std::min(fits, in_units(N, kBlock)));  // blocks
}

// Lines of the next rows of x, on their way into the second cache level
class Fetch {
 public:
  Fetch(const Number* from, int64_t stride, int64_t rows, int64_t K) : next_(from), stride_(stride), rows_(rows), lines_(in_units(K, kStep)) {}
  void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      _mm_prefetch(reinterpret_cast<const char*>(next_ + line_ * kStep), _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, next_ += stride_, --rows_;
    }
  }

 private:
  const Number* next_;
  int64_t stride_, rows_, lines_, line_ = 0;
};

template <bool kTurned>
void run(const Matrix& x, const Matrix& w, Number* out, int64_t N) {
  const int64_t T = x.rows, K = x.columns, steps = in_units(K, kStep), size = steps * kPairSize, blocks = in_units(N, kBlock);
  const int64_t threads = torch::stable::get_num_threads(), panel = panel_width(T, K, N, threads), panels = in_units(blocks, panel);
  constexpr int64_t kRows = 8 * kBlock;  // of a task
  const int64_t groups = in_units(T, kRows);
  const bool stream = T * N >= kStreamed;
  torch::stable::parallel_for(0, panels * groups, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<Number> scratch;
    Number* const packed_x = scratch.get((panel + 1) * size);
    STD_TORCH_CHECK(packed_x != nullptr, "product: out of memory");
    Number* const packed_w = packed_x + size;
    alignas(64) float sums[2][kBlock * kBlock];
    int turn = 0;
    const Tiles tiles;
    const vec::WaitForStreams wait;
    Writer writer;
    int64_t in_cache = -1;  // number of the panel
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = task / groups, first_block = number * panel, here = std::min(panel, blocks - first_block);
      if (number != in_cache) {
        for (int64_t j = 0; j < here; ++j)
          for (int64_t step = 0; step < steps; ++step) {
            Number* const to = packed_w + j * size + step * kPairSize;
            const int64_t column = (first_block + j) * kBlock;
            kTurned ? pack_rows<true>(w, column, step * kStep, to) : pack_pairs<false>(w, step * kStep, column, to);
          }
        in_cache = number;
      }
      const int64_t first_row = task % groups * kRows, last_row = std::min(T, first_row + kRows);
      for (int64_t row = first_row; row < last_row; row += kBlock) {
        Left a{x.data + row * x.stride, x.stride * 2, kTile * x.stride, kStep};
        if (row + kBlock > T || K % kStep != 0) {  // the units read whole tiles
          for (int64_t step = 0; step < steps; ++step) pack_rows<false>(x, row, step * kStep, packed_x + step * kPairSize);
          a = in_tiles(packed_x);
        }
        Fetch next(x.data + (row + kBlock) * x.stride, x.stride, std::min(T - row - kBlock, kBlock), K);
        for (int64_t j = 0; j < here; ++j, turn = 1 - turn) {
          block<false>(a, packed_w + j * size, steps, sums[turn], [&, lines = in_units(kBlock, here), rows = in_units(kBlock, steps)] {
            writer.write(rows);
            next.fetch(lines);
          });
          const int64_t column = (first_block + j) * kBlock;
          writer.start(sums[turn], out + row * N + column, N, T - row, N - column, stream);
        }
      }
    }
    writer.write(kBlock);
  });
}

Tensor multiply(Tensor x_in, Tensor weight_in, bool turned) {
  STD_TORCH_CHECK(available(), "product: the matrix units can't be used");
  STD_TORCH_CHECK(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(turned ? 1 : 0), "product: needs [T, K] and ",
                  turned ? "[N, K]" : "[K, N]");
  STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::BFloat16 && weight_in.scalar_type() == ScalarType::BFloat16, "product: needs bfloat16");
  STD_TORCH_CHECK(x_in.numel() > 0 && weight_in.numel() > 0, "product: needs matrices that are not empty");
  auto dense = [](const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); };
  auto matrix = [](const Tensor& x) { return Matrix{static_cast<const Number*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1)}; };
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const int64_t N = weight.size(turned ? 0 : 1);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), N});
  auto* const to = static_cast<Number*>(out.mutable_data_ptr());
  turned ? run<true>(matrix(x), matrix(weight), to, N) : run<false>(matrix(x), matrix(weight), to, N);
  return out;
}

#else

Tensor multiply(Tensor x, Tensor, bool) {
  STD_TORCH_CHECK(false, "product: built for a processor without matrix units");
  return x;
}

#endif

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) { m.impl("product", TORCH_BOX(&multiply)); }

}  // namespace
}  // namespace product
