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
#if !defined(__HIPCC__)
#include "tensor_map.h"
#endif
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

// wgmma, TMA, mbarriers and setmaxnreg as sm_90a has them: that target, and the host twins.
#if !PORT_DEVICE || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PORT_WARPGROUPS 1
#else
#define PORT_WARPGROUPS 0
#endif

// The target that is compiled for, 800 for sm_80; 0 where there is none (the host, AMD): for what a compiler needs for one target only.
#if defined(__CUDA_ARCH__)
#define PORT_TARGET __CUDA_ARCH__
#else
#define PORT_TARGET 0
#endif

#define DEVICE __device__ __forceinline__

#if defined(__HIPCC__) && !defined(__grid_constant__)
#define __grid_constant__
#endif

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
DEVICE float fast_inverse(float x) {
#if PORT_DEVICE && defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
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
  host_cuda::note_load(from, 16);
#endif
  return *static_cast<const uint4*>(from);
}
DEVICE void store16(void* to, uint4 value) {
#if !PORT_DEVICE
  host_cuda::check_aligned(to, 16, "stores a vector");
#endif
  *static_cast<uint4*>(to) = value;
#if !PORT_DEVICE
  host_cuda::note_store(to, 16);
#endif
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
  host_cuda::note_store(to, 8);
#else
  *static_cast<uint2*>(to) = {first, second};
#endif
}
DEVICE void store4(void* to, uint32_t value) {
#if !PORT_DEVICE
  host_cuda::check_aligned(to, 4, "stores a word");
  std::memcpy(to, &value, 4);
  host_cuda::note_store(to, 4);
#else
  *static_cast<uint32_t*>(to) = value;
#endif
}
DEVICE uint32_t load4(const void* from) {
#if PORT_DEVICE
  return *static_cast<const uint32_t*>(from);
#else
  host_cuda::check_aligned(from, 4, "loads a word");
  host_cuda::note_load(from, 4);
  uint32_t value;
  std::memcpy(&value, from, 4);
  return value;
#endif
}
struct Pair {
  float first, second;
};
DEVICE Pair load_pair(const void* from) {  // two floats, 8 bytes aligned
#if PORT_DEVICE
  const float2 pair = *static_cast<const float2*>(from);
  return {pair.x, pair.y};
#else
  host_cuda::check_aligned(from, 8, "loads two words");
  host_cuda::note_load(from, 8);
  Pair pair;
  std::memcpy(&pair, from, 8);
  return pair;
#endif
}
DEVICE void store_pair(void* to, float first, float second) { store8(to, float_to_bits(first), float_to_bits(second)); }

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

// The end of a kernel that was compiled for a target that lacks what it needs, or whose shared memory lies wrong: no launch should come here.
DEVICE void wrong_target() {
#if PORT_DEVICE && !defined(__HIPCC__) && defined(__CUDA_ARCH__)
  __trap();
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
  for (int lane = 0; lane < kWarpSize; lane++) host_cuda::note_load(lanes[lane]->row, 16);
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

// --- Warpgroups (sm_90a): four warps, products of 64 x N x 16, tiles by TMA, mbarriers --------------------------------------
//
// A tile is rows of 128 bytes (64 numbers of bf16) from an address that is a multiple of 1024, with the 16-byte pieces of each eight rows permuted:
// piece p of row i lies where piece p ^ (i % 8) would (TMA's and wgmma's 128-byte swizzle). wgmma and TMA see shared memory through the asynchronous
// proxy: after stores that they read or overwrite, each storing thread fences, before the barrier behind which the tile is used.
// Stores and loads of shared memory that host runs should check go through the functions of this file.
//
// Accumulators of D[64 x N] += A[64 x 16] B[16 x N]: of warp w (in its group) and lane 4 g + q, d[4 j + 2 h + e] is row 16 w + g + 8 h, column
// 8 j + 2 q + e. A in registers: a[0] rows g, columns 2q 2q+1; a[1] rows g+8; a[2], a[3] columns 2q+8 2q+9. So accumulators, rounded, are an A.

// A tensor [tokens, heads, 64] of bf16, of which TMA fetches rows. Filled by describe_rows on the host, a __grid_constant__ parameter of kernels.
struct Rows {
#if PORT_DEVICE && !defined(__HIPCC__)
  TensorMap map;
#else
  const bf16* from;
  int64_t tokens;
  int heads, rows;
#endif
};

// `rows`: of a tile. 0 or the runtime's error number.
inline int describe_rows(Rows& to, const void* from, int64_t tokens, int heads, int rows) {
#if defined(__HIPCC__)
  return (void)to, (void)from, (void)tokens, (void)heads, (void)rows, -1;
#elif PORT_DEVICE
  return encode_tensor_map(to.map, from, tokens, heads, rows);
#else
  to = {static_cast<const bf16*>(from), tokens, heads, rows};
  return 0;
#endif
}

#if PORT_WARPGROUPS

// Where a tile lies, for wgmma; 2 more for each 16 columns to the right, 128 more for each 16 rows down.
DEVICE uint64_t tile_descriptor(const void* tile) {
#if PORT_DEVICE
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
#else
  const uint32_t address = host_cuda::kSharedBase + uint32_t(static_cast<const char*>(tile) - host_cuda::block_now->shared.get());
#endif
  constexpr uint64_t kLayout = uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 16;  // 128-byte swizzle; bytes between eight rows
  return kLayout | (address >> 4 & 0x3fff);
}

#if PORT_DEVICE
#define PORT_SUMS4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PORT_SUMS16(d, i) PORT_SUMS4(d, i), PORT_SUMS4(d, i + 4), PORT_SUMS4(d, i + 8), PORT_SUMS4(d, i + 12)
#define PORT_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PORT_NAMES32 PORT_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// d += A B^T for A of 64 x 16 and B of kN x 16, or d = A B^T where not `add`. "Transposed": the tile has K in its rows.
template <bool kTransposed, int kN>
DEVICE void group_product(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool add) {
  static_assert(kN == 32 || kN == 64);
  if constexpr (kN == 64)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PORT_NAMES32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : PORT_SUMS16(d, 0), PORT_SUMS16(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTransposed)));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" PORT_NAMES16
        "}, {%16, %17, %18, %19}, %20, p, 1, 1, %22;\n}"
        : PORT_SUMS16(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTransposed)));
}
template <bool kTransposedA, bool kTransposedB, int kN>
DEVICE void group_product(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN == 32 || kN == 64);
  if constexpr (kN == 64)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PORT_NAMES32
        "}, %32, %33, p, 1, 1, %35, %36;\n}"
        : PORT_SUMS16(d, 0), PORT_SUMS16(d, 16)
        : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposedA)), "n"(int(kTransposedB)));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" PORT_NAMES16
        "}, %16, %17, p, 1, 1, %19, %20;\n}"
        : PORT_SUMS16(d, 0)
        : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposedA)), "n"(int(kTransposedB)));
}
#undef PORT_SUMS4
#undef PORT_SUMS16
#undef PORT_NAMES16
#undef PORT_NAMES32
// Before the first product, and after registers of one were in use otherwise.
DEVICE void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Accumulators are to be where they are now: the compiler may not move work on them across this, into products under way.
template <int kCount>
DEVICE void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(x[i])::"memory");
}
DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
DEVICE void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// A barrier of `threads` threads of the block; numbers 1 to 15.
DEVICE void sync_group(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
// This thread's stores so far become visible to TMA and wgmma.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
// Tiles are laid out from the beginning of shared memory, by its address: it must be a multiple of 1024, as SHARED_MEMORY asks for.
DEVICE void check_tiles(const void* shared) {
  int address = int(shared_address(shared));
  opaque(address);  // the compiler believes what SHARED_MEMORY says
  if (address % 1024) wrong_target();
}
DEVICE void mbarrier_init(uint64_t* at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}
DEVICE void mbarrier_arrive(uint64_t* at) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
// Arrives, and lets the phase end no sooner than `bytes` have come by TMA.
DEVICE void mbarrier_expect(uint64_t* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; the first phase's is 0.
DEVICE void mbarrier_wait(uint64_t* at, unsigned parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(shared_address(at)), "r"(parity)
        : "memory");
  } while (!ended);
}
// Starts loading the tile of a head's rows from `token` on; its bytes count for the mbarrier.
DEVICE void load_rows(void* tile, const Rows& rows, int head, int token, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                   shared_address(tile)),
               "l"(&rows.map), "r"(0), "r"(head), "r"(token), "r"(shared_address(barrier))
               : "memory");
}
// This warpgroup's registers per thread, from now on.
template <int kCount>
DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
// Four 8 x 8 matrices of bf16 as load_matrices gives them, to the rows that the lanes name.
DEVICE void store_matrices(bf16* row, const uint32_t* from) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(from[0]), "r"(from[1]), "r"(from[2]),
               "r"(from[3])
               : "memory");
}
// The same, each transposed; `from` in the order in which accumulators are: the second and third matrix change places.
DEVICE void store_matrices_transposed(bf16* row, const uint32_t* from) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(from[0]), "r"(from[2]),
               "r"(from[1]), "r"(from[3])
               : "memory");
}
#else
template <bool kTransposed, int kN>
inline void group_product(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool add, int line = __builtin_LINE()) {
  host_cuda::group_product({line, kN, 0, b, {a[0], a[1], a[2], a[3]}, d, true, false, kTransposed, add, 0});
}
template <bool kTransposedA, bool kTransposedB, int kN>
inline void group_product(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add, int line = __builtin_LINE()) {
  host_cuda::group_product({line, kN, a, b, {}, d, false, kTransposedA, kTransposedB, add, 0});
}
inline void group_fence() { host_cuda::group_fence(); }
template <int kCount>
inline void pin(float (&)[kCount]) {}
inline void group_commit() { host_cuda::group_commit(); }
template <int kLeft>
inline void group_wait(int line = __builtin_LINE()) {
  host_cuda::group_wait(kLeft, line);
}
inline void sync_group(int number, int threads, int line = __builtin_LINE()) { host_cuda::group_barrier(number, threads, line); }
inline void check_tiles(const void* shared) { host_cuda::check_aligned(shared, 1024, "lays out tiles"); }
inline void fence_async_proxy() { host_cuda::fence_async_proxy(); }
inline void mbarrier_init(uint64_t* at, int count) { host_cuda::mbarrier_init(at, count); }
inline void mbarrier_arrive(uint64_t* at) { host_cuda::mbarrier_arrive(at, 0); }
inline void mbarrier_expect(uint64_t* at, int bytes) { host_cuda::mbarrier_arrive(at, bytes); }
inline void mbarrier_wait(uint64_t* at, unsigned parity, int line = __builtin_LINE()) { host_cuda::mbarrier_wait(at, parity, line); }
inline void load_rows(void* tile, const Rows& from, int head, int token, uint64_t* barrier) {
  std::vector<const void*> rows;
  for (int i = 0; i < from.rows; i++)
    rows.push_back(token + i < from.tokens ? from.from + (int64_t(token + i) * from.heads + head) * 64 : nullptr);
  host_cuda::tma_load(tile, std::move(rows), barrier);
}
template <int kCount>
inline void registers_decrease(int line = __builtin_LINE()) {
  host_cuda::set_registers(kCount, line);
}
template <int kCount>
inline void registers_increase(int line = __builtin_LINE()) {
  host_cuda::set_registers(kCount, line);
}
struct MatrixStore {
  bf16* row;
  uint32_t from[4];
};
template <bool kTransposed>
inline void store_lanes(MatrixStore** lanes) {
  for (int m = 0; m < 4; m++)
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int g = lane / 4, q = lane % 4;
      const bf16 low{uint16_t(lanes[lane]->from[m])}, high{uint16_t(lanes[lane]->from[m] >> 16)};
      lanes[m * 8 + (kTransposed ? 2 * q : g)]->row[kTransposed ? g : 2 * q] = low;
      lanes[m * 8 + (kTransposed ? 2 * q + 1 : g)]->row[kTransposed ? g : 2 * q + 1] = high;
    }
}
inline void store_matrices(bf16* row, const uint32_t* from, int line = __builtin_LINE()) {
  host_cuda::check_aligned(row, 16, "stores a matrix row");
  MatrixStore it{row, {from[0], from[1], from[2], from[3]}};
  host_cuda::collective("store_matrices", line, it, store_lanes<false>);
  host_cuda::note_store(row, 16);
}
inline void store_matrices_transposed(bf16* row, const uint32_t* from, int line = __builtin_LINE()) {
  host_cuda::check_aligned(row, 16, "stores a matrix row");
  MatrixStore it{row, {from[0], from[2], from[1], from[3]}};
  host_cuda::collective("store_matrices_transposed", line, it, store_lanes<true>);
  host_cuda::note_store(row, 16);
}
#endif

#endif  // PORT_WARPGROUPS

// --- Launches -----------------------------------------------------------------------------------------------------------

#if PORT_DEVICE
#define SHARED_MEMORY(name) alignas(1024) extern __shared__ unsigned char name[]

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
// For kernels of warpgroups, whose asynchronous accesses host runs check.
template <class... Parameters, class... Arguments>
int launch_warpgroups(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes, int64_t stream,
                      const Arguments&... arguments) {
  return launch(kernel, blocks, threads, shared_bytes, stream, arguments...);
}
#else
#define SHARED_MEMORY(name) unsigned char* name = reinterpret_cast<unsigned char*>(host_cuda::block_now->shared.get())

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes, int64_t, Arguments... arguments) {
  return host_cuda::launch(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
}
template <class... Parameters, class... Arguments>
int launch_warpgroups(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes, int64_t, Arguments... arguments) {
  return host_cuda::launch(blocks, threads, shared_bytes, [=] { kernel(arguments...); }, true);
}
#endif

}  // namespace port
