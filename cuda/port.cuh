// The portability layer: everything that the kernels need beyond C++, each with a device version and a host twin.
//
// nvcc (or hipcc, after torch.utils.hipify) compiles the device versions. Any other compiler gets host_cuda.h from the tests,
// which executes blocks, threads, barriers and matrix instructions on a CPU and finds races and unwritten memory.
// Rules that keep one source serving both: kernels include nothing else from outside of cuda/*.cuh; inline PTX is written only here; shared memory is
// dynamic and comes from SHARED_MEMORY; sync_warp() wherever lanes exchange through memory; no spinning between blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <tuple>

#if defined(PORT_DEBUG)
#include <cstdio>
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define PORT_DEVICE 1
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#define PORT_DEVICE 0
#include "host_cuda.h"
#endif

// Tensor cores of bf16 (mma.sync m16n8k16), ldmatrix and cp.async: sm_80 and later, and the host twins.
#if !PORT_DEVICE || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define PORT_TENSOR_CORES 1
#else
#define PORT_TENSOR_CORES 0
#endif

// Whether the compiler's targets have them at all: not AMD's.
#if defined(__HIPCC__)
#define PORT_HAS_TENSOR_CORES 0
#else
#define PORT_HAS_TENSOR_CORES 1
#endif

// The target that is compiled for, 800 for sm_80; 0 where there is none (the host, AMD): for what a compiler needs for one target only.
#if defined(__CUDA_ARCH__)
#define PORT_TARGET __CUDA_ARCH__
#else
#define PORT_TARGET 0
#endif

#define DEVICE __device__ __forceinline__

namespace port {

constexpr int kWarpSize = 32;  // lanes that exchange; a wavefront of 64 is two of them
constexpr float kLog2E = 1.4426950408889634f;

// --- Numbers in memory: bits only, arithmetic is fp32 ---------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

DEVICE float bits_to_float(uint32_t bits) {
#if PORT_DEVICE
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

DEVICE uint32_t float_to_bits(float x) {
#if PORT_DEVICE
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

// Two floats as bf16, round to nearest even; `low` has the lower address.
DEVICE uint32_t pack_bf16(float low, float high) {
#if PORT_DEVICE && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const auto round = [](uint32_t bits) -> uint32_t {
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  };
  return round(float_to_bits(low)) | round(float_to_bits(high)) << 16;
#endif
}
DEVICE float low_bf16(uint32_t packed) { return bits_to_float(packed << 16); }
DEVICE float high_bf16(uint32_t packed) { return bits_to_float(packed & 0xffff0000u); }

#if !PORT_DEVICE
inline uint16_t float_to_half_bits(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7fffu);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  const float scaled = magnitude < 0x38800000u ? std::nearbyint(bits_to_float(magnitude) * 16777216.0f) : 0.0f;
  if (magnitude < 0x38800000u) return uint16_t(sign | uint32_t(scaled));  // subnormal: units of 2^-24
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}
inline float half_bits_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) / 16777216.0f;
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}
#endif

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(fp16 x) {
#if PORT_DEVICE
  return __half2float(__ushort_as_half(x.bits));
#else
  return half_bits_to_float(x.bits);
#endif
}

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return {uint16_t(pack_bf16(x, 0.0f) & 0xffffu)};
}
template <>
DEVICE fp16 from_float<fp16>(float x) {
#if PORT_DEVICE
  return {__half_as_ushort(__float2half_rn(x))};
#else
  return {float_to_half_bits(x)};
#endif
}

// Two halves in a word; `low` has the lower address.
template <class Half>
DEVICE uint32_t pack(Half low, Half high) {
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// --- Mathematics: `fast_` is the hardware's approximation (2 ulp), the others are exact to the last bit or two -------------

DEVICE float exact_exp(float x) { return expf(x); }
DEVICE float exact_log(float x) { return logf(x); }
DEVICE float exact_expm1(float x) { return expm1f(x); }
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE float fast_exp2(float x) {
#if PORT_DEVICE && defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
DEVICE float fast_divide(float x, float y) {
#if PORT_DEVICE
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

// The compiler may not assume anything about x from here on.
DEVICE void opaque(int& x) {
#if PORT_DEVICE && defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#else
  (void)x;
#endif
}

// --- Vectors of 16 bytes: aligned, one memory access ---------------------------------------------------------------------

DEVICE uint4 load16(const void* from) {
#if !PORT_DEVICE
  host_cuda::check_aligned(from, 16, "loads a vector");
#endif
  return *static_cast<const uint4*>(from);
}
DEVICE void store16(void* to, uint4 value) {
#if !PORT_DEVICE
  host_cuda::check_aligned(to, 16, "stores a vector");
#endif
  *static_cast<uint4*>(to) = value;
}
// 16 bytes of T as floats.
DEVICE void load_floats(float (&to)[4], const float* from) {
  const uint4 bits = load16(from);
  to[0] = bits_to_float(bits.x), to[1] = bits_to_float(bits.y), to[2] = bits_to_float(bits.z), to[3] = bits_to_float(bits.w);
}
template <class Half>
DEVICE void load_floats(float (&to)[8], const Half* from) {
  const uint4 bits = load16(from);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 8; i++) to[i] = to_float(Half{uint16_t(words[i / 2] >> (16 * (i % 2)))});
}
DEVICE void store_floats(float* to, float x, float y, float z, float w) {
  store16(to, {float_to_bits(x), float_to_bits(y), float_to_bits(z), float_to_bits(w)});
}
// 16 bytes of T from floats, rounded.
DEVICE void store_floats(float* to, const float (&from)[4]) { store_floats(to, from[0], from[1], from[2], from[3]); }
template <class Half>
DEVICE void store_floats(Half* to, const float (&from)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = pack(from_float<Half>(from[2 * i]), from_float<Half>(from[2 * i + 1]));
  store16(to, {words[0], words[1], words[2], words[3]});
}
DEVICE void store8(void* to, uint32_t first, uint32_t second) {
#if !PORT_DEVICE
  host_cuda::check_aligned(to, 8, "stores two words");
  std::memcpy(to, &first, 4);
  std::memcpy(static_cast<char*>(to) + 4, &second, 4);
#else
  *static_cast<uint2*>(to) = {first, second};
#endif
}
DEVICE void store4(void* to, uint32_t value) {
#if !PORT_DEVICE
  host_cuda::check_aligned(to, 4, "stores a word");
  std::memcpy(to, &value, 4);
#else
  *static_cast<uint32_t*>(to) = value;
#endif
}
DEVICE uint32_t load4(const void* from) {
#if PORT_DEVICE
  return *static_cast<const uint32_t*>(from);
#else
  host_cuda::check_aligned(from, 4, "loads a word");
  uint32_t value;
  std::memcpy(&value, from, 4);
  return value;
#endif
}

// Two words, the first at the lower address.
DEVICE void load8(const void* from, uint32_t& first, uint32_t& second) {
#if PORT_DEVICE
  const uint2 words = *static_cast<const uint2*>(from);
  first = words.x, second = words.y;
#else
  host_cuda::check_aligned(from, 8, "loads two words");
  std::memcpy(&first, from, 4);
  std::memcpy(&second, static_cast<const char*>(from) + 4, 4);
#endif
}

// --- Checks of values that only the device knows ---------------------------------------------------------------------------------

// With PORT_DEBUG (RWKV7_DEBUG_KERNELS=1 when the library is built) the kernel stops where `holds` is false; otherwise nothing is checked.
DEVICE void require(bool holds, const char* message) {
#if !defined(PORT_DEBUG)
  (void)holds, (void)message;
#elif PORT_DEVICE
  if (!holds) {
    printf("block %u: %s\n", blockIdx.x, message);
#if defined(__HIPCC__)
    abort();
#else
    __trap();
#endif
  }
#else
  if (!holds) host_cuda::stop(message);
#endif
}

// --- Barriers and shuffles. `line` tells the host where lanes met; the device ignores it ---------------------------------

#if PORT_DEVICE
#define PORT_HERE
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() {
#if defined(__HIPCC__)
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
#else
  __syncwarp();
#endif
}
DEVICE float shuffle_xor(float x, int lane_mask) {
#if defined(__HIPCC__)
  return __shfl_xor(x, lane_mask, kWarpSize);
#else
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
#endif
}
DEVICE float shuffle(float x, int source_lane) {
#if defined(__HIPCC__)
  return __shfl(x, source_lane, kWarpSize);
#else
  return __shfl_sync(0xffffffffu, x, source_lane);
#endif
}
#else
inline void sync_block(int line = __builtin_LINE()) { host_cuda::block_barrier(line); }
inline void sync_warp(int line = __builtin_LINE()) {
  int nothing = 0;
  host_cuda::collective("sync_warp", line, nothing, [](int**) { host_cuda::counts().warp_barriers++; });
}
struct ShuffleArguments {
  float value, result;
  int source;
};
inline void shuffle_lanes(ShuffleArguments** lanes) {
  for (int i = 0; i < kWarpSize; i++) lanes[i]->result = lanes[lanes[i]->source & 31]->value;
  host_cuda::counts().shuffles++;
}
inline float shuffle_xor(float x, int lane_mask, int line = __builtin_LINE()) {
  ShuffleArguments it{x, 0.0f, host_cuda::thread_now->lane ^ lane_mask};
  host_cuda::collective("shuffle_xor", line, it, shuffle_lanes);
  return it.result;
}
inline float shuffle(float x, int source_lane, int line = __builtin_LINE()) {
  ShuffleArguments it{x, 0.0f, source_lane};
  host_cuda::collective("shuffle", line, it, shuffle_lanes);
  return it.result;
}
#endif

// --- Matrix instructions (sm_80): fragments as the PTX manual lays them out -----------------------------------------------
//
// With g = lane / 4 and q = lane % 4, for D[16 x 8] += A[16 x 16] B[16 x 8]:
//   A: a[0] rows g, columns 2q 2q+1; a[1] rows g+8; a[2] row g, columns 2q+8 2q+9; a[3] row g+8, columns 2q+8 2q+9
//   B: b[0] rows 2q 2q+1, column g; b[1] rows 2q+8 2q+9, column g
//   D: d[0] d[1] row g, columns 2q 2q+1; d[2] d[3] row g+8
// So the D of two neighbouring tiles, rounded to bf16, is an A; and the D of a matrix is the B of its transpose.

#if PORT_TENSOR_CORES
#if PORT_DEVICE
// Four 8 x 8 matrices of bf16; lane i gives the address of row i % 8 of matrix i / 8, and gets elements (g, 2q), (g, 2q+1) of each.
DEVICE void load_matrices(uint32_t (&to)[4], const bf16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
// The same, each 8 x 8 matrix transposed.
DEVICE void load_matrices_transposed(uint32_t (&to)[4], const bf16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
DEVICE void matrix_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Of the 16 bytes `bytes` (0 or 16) are copied and the others become zeros: zeros take no stores, behind which the compiler lets copies wait.
DEVICE void copy16_async(void* to_shared, const void* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kLeft` of this thread's committed groups are still on their way.
template <int kLeft>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Asks for the cache line at `from` in the L2 cache, and waits for nothing.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
#else
struct MatrixLoad {
  const bf16* row;
  uint32_t* to;
};
template <bool kTransposed>
inline void load_lanes(MatrixLoad** lanes) {
  for (int m = 0; m < 4; m++)
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int g = lane / 4, q = lane % 4;
      const uint32_t low = kTransposed ? lanes[m * 8 + 2 * q]->row[g].bits : lanes[m * 8 + g]->row[2 * q].bits;
      const uint32_t high = kTransposed ? lanes[m * 8 + 2 * q + 1]->row[g].bits : lanes[m * 8 + g]->row[2 * q + 1].bits;
      lanes[lane]->to[m] = low | high << 16;
    }
  host_cuda::counts().matrix_loads++;
}
inline void load_matrices(uint32_t (&to)[4], const bf16* row, int line = __builtin_LINE()) {
  host_cuda::check_aligned(row, 16, "loads a matrix row");
  MatrixLoad it{row, to};
  host_cuda::collective("load_matrices", line, it, load_lanes<false>);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const bf16* row, int line = __builtin_LINE()) {
  host_cuda::check_aligned(row, 16, "loads a matrix row");
  MatrixLoad it{row, to};
  host_cuda::collective("load_matrices_transposed", line, it, load_lanes<true>);
}
struct MatrixProduct {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
inline void product_lanes(MatrixProduct** lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const int g = lane / 4, q = lane % 4;
    for (int part = 0; part < 4; part++) {
      const int row = g + 8 * (part % 2), column = 2 * q + 8 * (part / 2);
      a[row][column] = low_bf16(lanes[lane]->a[part]);
      a[row][column + 1] = high_bf16(lanes[lane]->a[part]);
    }
    for (int part = 0; part < 2; part++) {
      b[2 * q + 8 * part][g] = low_bf16(lanes[lane]->b[part]);
      b[2 * q + 8 * part + 1][g] = high_bf16(lanes[lane]->b[part]);
    }
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const int g = lane / 4, q = lane % 4;
    for (int part = 0; part < 4; part++) lanes[lane]->d[part] += d[g + 8 * (part / 2)][2 * q + part % 2];
  }
  host_cuda::counts().matrix_products++;
}
inline void matrix_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  MatrixProduct it{d, a, {b0, b1}};
  host_cuda::collective("matrix_product", line, it, product_lanes);
}
inline void copy16_async(void* to_shared, const void* from, int bytes) { host_cuda::copy_async(to_shared, from, 16, bytes); }
inline void copy_async_commit() { host_cuda::copy_async_commit(); }
template <int kLeft>
inline void copy_async_wait() {
  host_cuda::copy_async_wait(kLeft);
}
inline void prefetch(const void* from) { host_cuda::touch(from); }
#endif
#endif  // PORT_TENSOR_CORES

// --- Launches -----------------------------------------------------------------------------------------------------------

#if PORT_DEVICE
#define SHARED_MEMORY(name) alignas(128) extern __shared__ unsigned char name[]

// Returns 0 or the runtime's error number. `stream` is a cudaStream_t as an integer: callers need no CUDA header.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes, int64_t stream, Arguments... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  const auto failed = [](cudaError_t error) {
    cudaGetLastError();  // clears it: the caller reports it, and the next check elsewhere must not find it again
    return int(error);
  };
  if (shared_bytes > 48 * 1024) {
    const int bytes = int(shared_bytes);
    if (const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return failed(error);
    // The default share of shared memory in the L1 cache can be too small for the two blocks per SM that __launch_bounds__ counts on.
    const int most = 100;  // percent: cudaSharedmemCarveoutMaxShared, a name that hipify doesn't know
    if (const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, most)) return failed(error);
  }
  std::tuple<Parameters...> parameters(arguments...);
  return std::apply(
      [&](auto&... parameter) {
        void* addresses[] = {&parameter...};
        // The result of this call, not cudaGetLastError(): that may be an error of an earlier, unrelated call.
        const cudaError_t error =
            cudaLaunchKernel(function, dim3(blocks), dim3(threads), addresses, shared_bytes, reinterpret_cast<cudaStream_t>(stream));
        return error ? failed(error) : 0;
      },
      parameters);
}
#else
#define SHARED_MEMORY(name) unsigned char* name = reinterpret_cast<unsigned char*>(host_cuda::block_now->shared.get())

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes, int64_t, Arguments... arguments) {
  return host_cuda::launch(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
}
#endif

}  // namespace port
