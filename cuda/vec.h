// Explicit vectors of floats through the compiler's vector extension (g++ and clang, any CPU), as wide as the build's
// instruction set: 16 lanes with AVX-512, 8 with AVX, 4 otherwise (SSE2, NEON).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
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

typedef float Four __attribute__((vector_size(16)));

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
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const Float shifted = x * 1.44269504f + rounding;
  const Float n = shifted - rounding;
  Float f = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  f = f + n * 2.12194440e-4f;
  Float p = splat(1.9875691500e-4f);  // minimax polynomial of (e^f - 1 - f) / f^2 on |f| <= ln(2)/2 (Cephes expf)
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  const Uint exponent = ((Uint)shifted - 0x4B400000u + 127u) << 23;  // bits of `rounding` are 0x4B400000
  return p * (Float)exponent;
}

inline Float from_bf16(const void* p) {
#if defined(__AVX512F__)  // one instruction where g++ makes five of __builtin_convertvector
  return (Float)((Uint)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))) << 16);
#else
  return (Float)(__builtin_convertvector(load_as<Ushort>(p), Uint) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline void to_bf16(void* p, Float x) {
  const Uint bits = (Uint)x;
  const Uint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Uint quiet = (bits >> 16) | 0x40u;
  const Ushort out = __builtin_convertvector((x == x) ? rounded : quiet, Ushort);
  std::memcpy(p, &out, sizeof out);
}

struct Bf16 { uint16_t bits; };
inline Float load(const Bf16* p) { return from_bf16(p); }
inline void store(Bf16* p, Float v) { to_bf16(p, v); }

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
