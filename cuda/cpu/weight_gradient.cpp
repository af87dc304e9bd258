// Gradients of bf16 weights by a CPU's matrix units (AMX):  out [M, N] = a^T b,  a [T, M], b [T, N], summed over the tokens in fp32, rounded once.
//
// PyTorch's product reads a^T across its rows, at half the rate of its other products. Here a thread takes a part of out and sums it up over chunks
// of tokens: of a chunk it packs its columns of b into the second cache level, and 32 columns of a at a time into the first.
// Every sum is made in the same order on any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "matrix_units.h"

namespace weight_gradient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("has_matrix_units(Tensor any) -> bool");  // a tensor, by which the dispatcher finds the device
  m.def("weight_gradient(Tensor a, Tensor b) -> Tensor");
}

#ifdef MATRIX_UNITS

using namespace matrix_units;

constexpr int64_t kChunk = 512;              // tokens
constexpr int64_t kTall = 256, kWide = 512;  // of a part of out, at most: with a chunk of b its sums take 1 MiB

void run(const Matrix& a, const Matrix& b, Number* out) {
  const int64_t T = a.rows, M = a.columns, N = b.columns, blocks = in_units(M, kBlock), threads = torch::stable::get_num_threads();
  const int64_t columns = in_units(N, kWide), wide = in_units(in_units(N, columns), kBlock);
  const int64_t tall = std::clamp<int64_t>(blocks * columns / threads, 1, kTall / kBlock), rows = in_units(blocks, tall);
  const int64_t chunk_steps = in_units(std::min(T, kChunk), kStep);
  torch::stable::parallel_for(0, columns * rows, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<Number> scratch;
    static thread_local Scratch<float> scratch_sums;
    Number* const packed_a = scratch.get((wide + 1) * chunk_steps * kPairSize);
    float* const sums = scratch_sums.get(tall * wide * kBlock * kBlock);
    STD_TORCH_CHECK(packed_a != nullptr && sums != nullptr, "weight_gradient: out of memory");
    Number* const packed_b = packed_a + chunk_steps * kPairSize;
    const Tiles tiles;
    const vec::WaitForStreams wait;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_i = task % rows * tall, last_i = std::min(blocks, first_i + tall);
      const int64_t first_j = task / rows * wide, last_j = std::min(in_units(N, kBlock), first_j + wide);
      Writer writer;
      for (int64_t token = 0; token < T; token += kChunk) {
        const int64_t steps = in_units(std::min(T - token, kChunk), kStep), size = steps * kPairSize;
        for (int64_t step = 0; step < steps; ++step)
          for (int64_t j = first_j; j < last_j; ++j)
            pack_pairs<false>(b, token + step * kStep, j * kBlock, packed_b + (j - first_j) * size + step * kPairSize);
        for (int64_t i = first_i; i < last_i; ++i) {
          for (int64_t step = 0; step < steps; ++step) pack_pairs<true>(a, token + step * kStep, i * kBlock, packed_a + step * kPairSize);
          const Number* next = a.data + token * a.stride + (i + 1) * kBlock;
          int64_t to_fetch = i + 1 < last_i ? std::min(T - token, kChunk) : 0;
          auto each = [&, lines = in_units(kBlock, last_j - first_j), lines_written = in_units(kBlock, steps)] {
            for (int64_t line = 0; line < lines && to_fetch > 0; ++line, --to_fetch, next += a.stride)
              _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
            writer.write(lines_written);
          };
          for (int64_t j = first_j; j < last_j; ++j) {
            float* const own = sums + ((i - first_i) * wide + j - first_j) * kBlock * kBlock;
            const Number* from_b = packed_b + (j - first_j) * size;
            token == 0 ? block<false>(in_tiles(packed_a), from_b, steps, own, each) : block<true>(in_tiles(packed_a), from_b, steps, own, each);
            if (token + kChunk >= T) writer.start(own, out + i * kBlock * N + j * kBlock, N, M - i * kBlock, N - j * kBlock, true);
          }
        }
      }
      writer.write(kBlock);
    }
  });
}

Tensor gradient(Tensor a_in, Tensor b_in) {
  STD_TORCH_CHECK(available(), "weight_gradient: the matrix units can't be used");
  STD_TORCH_CHECK(a_in.dim() == 2 && b_in.dim() == 2 && a_in.size(0) == b_in.size(0), "weight_gradient: needs [T, M] and [T, N]");
  STD_TORCH_CHECK(a_in.scalar_type() == ScalarType::BFloat16 && b_in.scalar_type() == ScalarType::BFloat16, "weight_gradient: needs bfloat16");
  STD_TORCH_CHECK(a_in.numel() > 0 && b_in.numel() > 0, "weight_gradient: needs matrices that are not empty");
  auto dense = [](const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); };
  auto matrix = [](const Tensor& x) { return Matrix{static_cast<const Number*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1)}; };
  const Tensor a = dense(a_in), b = dense(b_in), out = torch::stable::new_empty(a, {a.size(1), b.size(1)});
  run(matrix(a), matrix(b), static_cast<Number*>(out.mutable_data_ptr()));
  return out;
}

bool usable() { return available(); }

#else

bool usable() { return false; }
Tensor gradient(Tensor a, Tensor) {
  STD_TORCH_CHECK(false, "weight_gradient: built for a processor without matrix units");
  return a;
}

#endif

bool has_matrix_units(Tensor) { return usable(); }

STABLE_TORCH_LIBRARY_IMPL(rwkv7, CPU, m) {
  m.impl("has_matrix_units", TORCH_BOX(&has_matrix_units));
  m.impl("weight_gradient", TORCH_BOX(&gradient));
}

}  // namespace
}  // namespace weight_gradient
