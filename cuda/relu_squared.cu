// relu(x)^2 and its gradient 2 relu(x) dy, each in one pass over memory: forward 1 element read and 1 written, backward 2 read and 1 written.
#include "row_tiles.cuh"

namespace {

constexpr int kThreads = 256;

DEVICE float positive(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN

// out = 2 relu(x) dy, or relu(x)^2 where there is no dy.
template <class T>
__global__ void __launch_bounds__(kThreads) relu_squared(const T* dy, const T* x, T* out, int64_t numel) {
  constexpr int per_vector = 16 / int(sizeof(T));
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, vectors = numel / per_vector;
  if (thread < vectors) {
    float z[per_vector], d[per_vector];
    load_floats(z, x + thread * per_vector);
    if (dy) load_floats(d, dy + thread * per_vector);
#pragma unroll
    for (int i = 0; i < per_vector; i++) z[i] = positive(z[i]) * (dy ? 2.0f * d[i] : positive(z[i]));
    store_floats(out + thread * per_vector, z);
    return;
  }
  const int64_t rest = vectors * per_vector + (thread - vectors);  // fewer elements than a vector has
  if (rest >= numel) return;
  const float z = positive(to_float(x[rest]));
  out[rest] = from_float<T>(z * (dy ? 2.0f * to_float(dy[rest]) : z));
}

int run(int dtype, int64_t numel, const void* dy, const void* x, void* out, int64_t stream) {
  return by_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    constexpr int per_vector = 16 / int(sizeof(T));
    const int64_t threads = numel / per_vector + numel % per_vector;
    if (threads == 0) return 0;
    const unsigned blocks = unsigned((threads + kThreads - 1) / kThreads);
    return launch(relu_squared<T>, blocks, kThreads, 0, stream, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(out), numel);
  });
}

}  // namespace

extern "C" {

// Return 0, a CUDA error number, or -1 for another dtype. All pointers are to the current device and multiples of 16.
int relu_squared_forward(int dtype, int64_t numel, const void* x, void* out, int64_t stream) { return run(dtype, numel, nullptr, x, out, stream); }

int relu_squared_backward(int dtype, int64_t numel, const void* dy, const void* x, void* dx, int64_t stream) {
  return run(dtype, numel, dy, x, dx, stream);
}
}
