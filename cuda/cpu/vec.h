// Explicit vectors of floats through the compiler's vector extension (g++ and clang, any CPU), as wide as the build's
// instruction set: 16 lanes with AVX-512, 8 with AVX, 4 otherwise (SSE2, NEON).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace vec {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Uint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Ushort __attribute__((vector_size(2 * kLanes)));

inline Float splat(float x) { return x - Float{}; }  // x - 0 is x, -0 included: the compiler leaves a broadcast

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Float load(const float* p) { return load_as<Float>(p); }
inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }

// Stores past the caches: memory isn't read before it is overwritten. p is aligned to the vector; a cache line is expensive unless all of it is
// written within a few stores.
constexpr int64_t kLine = 64;  // bytes
inline void stream(float* p, Float v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
inline void stream_line(void* to, const void* line) {
  for (int64_t i = 0; i < kLine / 4; i += kLanes) stream(static_cast<float*>(to) + i, load(static_cast<const float*>(line) + i));
}
inline bool starts_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }
// When this ends, other threads may read what was streamed.
struct WaitForStreams {
  ~WaitForStreams() {
#if defined(__SSE__)
    _mm_sfence();
#endif
  }
};

typedef float Four __attribute__((vector_size(16)));

// The vector whose lanes 4 i .. 4 i + 3 are the four floats at p + i * stride.
inline Float load_fours(const float* p, int64_t stride) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2);
  return (Float)_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * stride), 3);
#elif defined(__AVX__)
  return (Float)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
#else
  (void)stride;
  return load(p);
#endif
}

// Of each four lanes, the 4 x 4 numbers of the four vectors transposed.
inline void transpose_fours(Float (&v)[4]) {
#if defined(__SSE__)
#if defined(__AVX512F__)
#define VEC_CALL(name) _mm512_##name
#elif defined(__AVX__)
#define VEC_CALL(name) _mm256_##name
#else
#define VEC_CALL(name) _mm_##name
#endif
  const auto low01 = VEC_CALL(unpacklo_ps)(v[0], v[1]), high01 = VEC_CALL(unpackhi_ps)(v[0], v[1]);
  const auto low23 = VEC_CALL(unpacklo_ps)(v[2], v[3]), high23 = VEC_CALL(unpackhi_ps)(v[2], v[3]);
  v[0] = (Float)VEC_CALL(shuffle_ps)(low01, low23, 0x44), v[1] = (Float)VEC_CALL(shuffle_ps)(low01, low23, 0xEE);
  v[2] = (Float)VEC_CALL(shuffle_ps)(high01, high23, 0x44), v[3] = (Float)VEC_CALL(shuffle_ps)(high01, high23, 0xEE);
#undef VEC_CALL
#else
  const Float a = v[0], b = v[1], c = v[2], d = v[3];
  for (int i = 0; i < 4; ++i) v[i] = Float{a[i], b[i], c[i], d[i]};
#endif
}

// The sum of the lanes, in pairs.
inline float sum(Float v) {
  float lanes[kLanes];
  store(lanes, v);
  Four four = load_as<Four>(lanes);
#pragma GCC unroll 4
  for (int i = 4; i < kLanes; i += 4) four += load_as<Four>(lanes + i);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// exp(x) to about 1 ulp, x cut to [-87, 88]; NaN stays NaN.
inline Float exp(Float x) {
#if defined(__AVX512F__)  // of two operands of which one is NaN, min and max give the second
  x = (Float)_mm512_max_ps((__m512)splat(-87.0f), _mm512_min_ps((__m512)splat(88.0f), (__m512)x));
  const Float n = (Float)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const Float shifted = x * 1.44269504f + rounding;
  const Float n = shifted - rounding;
#endif
  Float f = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  f = f + n * 2.12194440e-4f;
  Float p = splat(1.9875691500e-4f);  // minimax polynomial of (e^f - 1 - f) / f^2 on |f| <= ln(2)/2 (Cephes expf)
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
#if defined(__AVX512F__)
  return (Float)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Uint exponent = ((Uint)shifted - 0x4B400000u + 127u) << 23;  // bits of `rounding` are 0x4B400000
  return p * (Float)exponent;
#endif
}

// 1 / x of a normal number: off by at most 1.5 ulp with AVX-512, rounded correctly elsewhere; 0 beyond 2^126 while FlushDenormals lives. Of 0
// and of infinity NaN with AVX-512: not for callers that may have these.
inline Float reciprocal(Float x) {
#if defined(__AVX512F__)  // a guess of 14 bits and one step of Newton's: a fifth of the time of a division
  const Float guess = (Float)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

inline Float sqrt(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
  return (Float)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
  return (Float)_mm_sqrt_ps((__m128)x);
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

inline Float sigmoid(Float x) { return reciprocal(1.0f + exp(-x)); }

inline Float from_bf16(const void* p) {
#if defined(__AVX512F__)  // one instruction where g++ makes five of __builtin_convertvector
  return (Float)((Uint)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))) << 16);
#else
  return (Float)(__builtin_convertvector(load_as<Ushort>(p), Uint) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN. Numbers below 1e-38 may become zero.
inline void to_bf16(void* p, Float x) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &rounded, sizeof rounded);
#else
  const Uint bits = (Uint)x;
  const Uint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Uint quiet = (bits >> 16) | 0x40u;
  const Ushort out = __builtin_convertvector((x == x) ? rounded : quiet, Ushort);
  std::memcpy(p, &out, sizeof out);
#endif
}

struct Bf16 { uint16_t bits; };
inline Float load(const Bf16* p) { return from_bf16(p); }
inline void store(Bf16* p, Float v) { to_bf16(p, v); }

// Rounds a cache line's worth of numbers and stores it past the caches.
inline void stream_line(Bf16* to, const float* from) {
#if defined(__AVX512BF16__)
  const __m512bh line = _mm512_cvtne2ps_pbh((__m512)load(from + kLanes), (__m512)load(from));
  stream(reinterpret_cast<float*>(to), load_as<Float>(&line));
#else
  alignas(kLine) Bf16 line[kLine / sizeof(Bf16)];
  for (int64_t i = 0; i < kLine / 2; i += kLanes) store(line + i, load(from + i));
  stream_line(static_cast<void*>(to), static_cast<const void*>(line));
#endif
}

// Numbers below 1e-38 count as zero while this lives: a state that fades away would otherwise cost 30 times the time.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace vec
