// Cross entropy with L2Wrap: one pass over the logits forward, one that writes the gradient over them. Formulas: cross_entropy.h.
//
// One block owns one row. Forward keeps a running maximum and the sum of exponentials relative to it, per thread, then merges them
// over lanes and warps in a fixed order: two runs give equal bits. Rows that don't count are not read.
// A row of V elements starts at any multiple of an element's size: single elements up to the first 16-byte boundary, then vectors, then the rest.
#include "port.cuh"

namespace {

using namespace port;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLowest = -3.402823466e38f;  // a start for maxima that, unlike -infinity, can be subtracted
constexpr int kNowhere = 0x7fffffff;

// e^x for x <= 0, as exact as the logits deserve: the hardware's approximation (2^-22) for 16-bit ones.
template <class T>
DEVICE float exponential(float x) {
  if constexpr (sizeof(T) == 4)
    return exact_exp(x);
  else
    return fast_exp2(kLog2E * x);
}

// Calls f(row + i, i, number of elements) for a partition of [0, size) among the block's threads, in ascending order for each thread. The number, 1 or
// the elements of 16 bytes, is an integral constant.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class T, class F>
DEVICE void for_each_piece(T* row, int size, F f) {
  constexpr int per_vector = 16 / int(sizeof(T));
  const int thread = int(threadIdx.x);
  const int misaligned = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int gap = misaligned ? per_vector - misaligned : 0;
  const int head = gap < size ? gap : size;
  const int body_end = head + (size - head) / per_vector * per_vector;
  if (thread < head) f(row + thread, thread, Count<1>{});
  for (int i = head + per_vector * thread; i < body_end; i += per_vector * kThreads) f(row + i, i, Count<per_vector>{});
  if (body_end + thread < size) f(row + body_end + thread, body_end + thread, Count<1>{});
}

template <class T>
DEVICE void load_piece(float (&to)[1], const T* from) {
  to[0] = to_float(*from);
}
template <class T, int n>
DEVICE void load_piece(float (&to)[n], const T* from) {
  load_floats(to, from);
}
template <class T>
DEVICE void store_piece(T* to, const float (&from)[1]) {
  *to = from_float<T>(from[0]);
}
template <class T, int n>
DEVICE void store_piece(T* to, const float (&from)[n]) {
  store_floats(to, from);
}

// Largest element so far, its first index, and the sum of exp(z - largest).
template <class T>
struct Running {
  float largest = kLowest, total = 0.0f;
  int where = kNowhere;

  template <int n>
  DEVICE void take(const float (&z)[n], int first) {
    float top = z[0];
    int at = 0;
#pragma unroll
    for (int i = 1; i < n; i++)
      if (z[i] > top) top = z[i], at = i;
    if (top > largest) {
      total *= exponential<T>(largest - top);
      largest = top;
      where = first + at;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < n; i++) sum += exponential<T>(z[i] - largest);
    total += sum;
  }

  DEVICE void merge(float other_largest, float other_total, int other_where) {
    const float top = other_largest > largest ? other_largest : largest;
    total = total * exponential<T>(largest - top) + other_total * exponential<T>(other_largest - top);
    if (other_largest > largest || (other_largest == largest && other_where < where)) where = other_where;
    largest = top;
  }
};

struct Forward {
  const void* logits;
  const int64_t* targets;
  int64_t ignore_index;
  float *nll, *largest, *total;
  int64_t* where;
  int vocabulary;
};

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_forward(Forward p) {
  SHARED_MEMORY(shared);
  float* const largest = reinterpret_cast<float*>(shared);  // each [kWarps]
  float* const total = largest + kWarps;
  int* const where = reinterpret_cast<int*>(total + kWarps);
  const int64_t number = blockIdx.x;
  const int thread = int(threadIdx.x), warp = thread / kWarpSize;
  const int64_t target = p.targets[number];
  if (target == p.ignore_index) {
    if (thread == 0) p.nll[number] = 0.0f, p.largest[number] = 0.0f, p.total[number] = 1.0f, p.where[number] = 0;
    return;
  }
  const T* const row = static_cast<const T*>(p.logits) + number * p.vocabulary;
  Running<T> mine;
  for_each_piece(row, p.vocabulary, [&](const T* from, int first, auto count) {
    float z[decltype(count)::value];
    load_piece(z, from);
    mine.take(z, first);
  });
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    mine.merge(shuffle_xor(mine.largest, mask), shuffle_xor(mine.total, mask),
               int(float_to_bits(shuffle_xor(bits_to_float(uint32_t(mine.where)), mask))));
  if (thread % kWarpSize == 0) largest[warp] = mine.largest, total[warp] = mine.total, where[warp] = mine.where;
  sync_block();
  if (thread != 0) return;
  for (int other = 1; other < kWarps; other++) mine.merge(largest[other], total[other], where[other]);
  const bool valid = target >= 0 && target < p.vocabulary;  // else the loss is NaN: louder than a read out of place
  const float picked = valid ? to_float(row[target]) : bits_to_float(0x7fc00000u);
  p.nll[number] = exact_log(mine.total) - (picked - mine.largest);
  p.largest[number] = mine.largest;
  p.total[number] = mine.total;
  p.where[number] = mine.where < p.vocabulary ? mine.where : 0;  // nowhere: nothing but NaN and -infinity
}

struct Backward {
  void* logits;
  const int64_t* targets;
  const float *largest, *total;
  const int64_t* where;
  const float* scale;
  float l2wrap;
  int vocabulary;
};

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_backward(Backward p) {
  const int64_t number = blockIdx.x;
  T* const row = static_cast<T*>(p.logits) + number * p.vocabulary;
  const float scale = p.scale[number], largest = p.largest[number], factor = scale / p.total[number], pull = largest * scale * p.l2wrap;
  const int target = int(p.targets[number]), where = int(p.where[number]);
  for_each_piece(row, p.vocabulary, [&](T* at, int first, auto count) {
    constexpr int n = decltype(count)::value;
    float z[n];
    if (scale == 0.0f) {
#pragma unroll
      for (int i = 0; i < n; i++) z[i] = 0.0f;
    } else {
      load_piece(z, at);
#pragma unroll
      for (int i = 0; i < n; i++) {
        z[i] = exponential<T>(z[i] - largest) * factor;
        if (first + i == target) z[i] -= scale;
        if (first + i == where) z[i] += pull;
      }
    }
    store_piece(at, z);
  });
}

constexpr int kNoSuchKernel = -1;
constexpr size_t kForwardBytes = kWarps * (2 * sizeof(float) + sizeof(int));

// The kernel for a dtype (0: fp32, 1: bf16, 2: fp16).
#define CHOOSE(kernel, shared_bytes)                                                                           \
  if (rows == 0) return 0;                                                                                     \
  switch (dtype) {                                                                                             \
    case 0: return launch(kernel<float>, unsigned(rows), kThreads, shared_bytes, stream, p);                   \
    case 1: return launch(kernel<bf16>, unsigned(rows), kThreads, shared_bytes, stream, p);                    \
    case 2: return launch(kernel<fp16>, unsigned(rows), kThreads, shared_bytes, stream, p);                    \
    default: return kNoSuchKernel;                                                                             \
  }

}  // namespace

extern "C" {

// Both return 0, a CUDA error number, or -1 for another dtype. All pointers are to the current device; logits [rows, vocabulary] at any multiple of
// their element's size. A target outside of [0, vocabulary) that isn't ignore_index makes its row's nll NaN.
int cross_entropy_l2wrap_forward(int dtype, int64_t rows, int vocabulary, const void* logits, const int64_t* targets, int64_t ignore_index,
                                 float* nll, float* largest, float* total, int64_t* where, int64_t stream) {
  const Forward p{logits, targets, ignore_index, nll, largest, total, where, vocabulary};
  CHOOSE(cross_entropy_forward, kForwardBytes)
}

int cross_entropy_l2wrap_backward(int dtype, int64_t rows, int vocabulary, void* logits, const int64_t* targets, const float* largest,
                                  const float* total, const int64_t* where, const float* scale, float l2wrap, int64_t stream) {
  const Backward p{logits, targets, largest, total, where, scale, l2wrap, vocabulary};
  CHOOSE(cross_entropy_backward, 0)
}
}
