// Number formats, shuffles and matrix instructions of port.cuh, one entry point each, to be checked against torch.
#include "port.cuh"

namespace {

using namespace port;

template <class T>
__global__ void round_trip(const float* in, T* rounded, float* back, int count) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    rounded[i] = from_float<T>(in[i]);
    back[i] = to_float(rounded[i]);
  }
}

// d = a b with a [16, 16], b [16, 8] row by row: a through load_matrices, b through load_matrices_transposed.
__global__ void multiply(const bf16* a, const bf16* b, float* d) {
  SHARED_MEMORY(shared);
  bf16* const as = reinterpret_cast<bf16*>(shared);
  bf16* const bs = as + 256;
  const int lane = int(threadIdx.x), g = lane / 4, q = lane % 4;
  for (int i = lane; i < 256; i += 32) as[i] = a[i];
  for (int i = lane; i < 128; i += 32) bs[i] = b[i];
  for (int i = lane; i < 128; i += 32) bs[128 + i] = b[i];
  sync_warp();
  uint32_t af[4], bf[4];
  load_matrices(af, as + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices_transposed(bf, bs + lane * 8);
  float c[4] = {};
  matrix_product(c, af, bf[0], bf[1]);
  d[g * 8 + 2 * q] = c[0], d[g * 8 + 2 * q + 1] = c[1], d[(g + 8) * 8 + 2 * q] = c[2], d[(g + 8) * 8 + 2 * q + 1] = c[3];
}

__global__ void shuffles(const float* in, float* by_xor, float* from_lane) {
  by_xor[threadIdx.x] = shuffle_xor(in[threadIdx.x], 5);
  from_lane[threadIdx.x] = shuffle(in[threadIdx.x], 3);
}

}  // namespace

extern "C" {
int arithmetic_bf16(const float* in, uint16_t* rounded, float* back, int count) {
  return launch(round_trip<bf16>, 1, 32, 0, 0, in, reinterpret_cast<bf16*>(rounded), back, count);
}
int arithmetic_fp16(const float* in, uint16_t* rounded, float* back, int count) {
  return launch(round_trip<fp16>, 1, 32, 0, 0, in, reinterpret_cast<fp16*>(rounded), back, count);
}
int arithmetic_multiply(const uint16_t* a, const uint16_t* b, float* d) {
  return launch(multiply, 1, 32, 1024, 0, reinterpret_cast<const bf16*>(a), reinterpret_cast<const bf16*>(b), d);
}
int arithmetic_shuffles(const float* in, float* by_xor, float* from_lane) { return launch(shuffles, 1, 32, 0, 0, in, by_xor, from_lane); }
}
