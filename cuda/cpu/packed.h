// bf16 matrices at 12 bits a number, without loss: what is multiplied from memory is there in three quarters of the time.
//
// The upper byte of a bf16 number is its sign and the upper 7 of its exponent's 8 bits. In nearly all numbers of a matrix these 7 bits are one
// of 7 neighbouring values, or 0: with the sign that is a code of 4 bits. The few others are stored as 0 and listed with their row. (The
// exponents of language models' weights carry about 2.6 bits: Zhang et al. 2025, arXiv 2504.11651.)
//
// In memory: Header, int32 first[rows + 1] (row r's exceptions are first[r] .. first[r+1]), Exception[], and from a multiple of 64 bytes
// the rows. A row is groups of 128 numbers: 64 + 64 lower bytes, then 64 bytes of codes, the first 64 numbers' in their low halves. Of
// 64 numbers, number 16 v + 4 q + d is at 16 q + 8 (v / 2) + 2 d + v % 2, where interleaving bytes brings it to its place.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace packed {

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define PACKED_PAYS  // elsewhere there is no such lookup of bytes, or it hasn't been tried
#endif

constexpr int64_t kGroup = 128, kHalf = 64, kGroupBytes = 192;
constexpr int kNeighbours = 7, kMostBase = 127 - kNeighbours;

struct Header { int64_t rows, columns, exceptions, base; };
struct Exception { int32_t column; float value; };

inline int64_t row_bytes(int64_t columns) { return columns / kGroup * kGroupBytes; }
inline int64_t rows_offset(int64_t rows, int64_t exceptions) {
  const int64_t end = sizeof(Header) + 4 * (rows + 1) + sizeof(Exception) * exceptions;
  return (end + 63) / 64 * 64;
}
inline int64_t total_bytes(int64_t rows, int64_t columns, int64_t exceptions) {
  return rows_offset(rows, exceptions) + rows * row_bytes(columns);
}

// Seven bits of the exponent; code 0: these are 0, code i: base + i, and 8 more for a negative number.
inline int upper(uint16_t bits) { return bits >> 8 & 127; }
inline bool coded(uint16_t bits, int base) { return upper(bits) == 0 || static_cast<unsigned>(upper(bits) - base - 1) < unsigned{kNeighbours}; }
inline uint8_t upper_byte(int code, int base) { return (code & 8) << 4 | (code & 7 ? base + (code & 7) : 0); }

#if defined(PACKED_PAYS)
// Some of a group's numbers: kVectors vectors in each of kParts parts.
class Unpack {
 public:
  static constexpr int kVectors = 4, kParts = kGroup / (kVectors * vec::kLanes);
  static constexpr int64_t column(int part, int vector) { return part * vec::kLanes / 16 * kHalf + 16 * vector + part * vec::kLanes % 16; }

#if defined(__AVX512BW__)
  void operator()(const uint8_t* group, int part, vec::Float (&out)[kVectors]) const {
    const __m512i codes = _mm512_srli_epi16(_mm512_loadu_si512(group + 2 * kHalf), 4 * part);
    const __m512i high = _mm512_shuffle_epi8(table_, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
    const __m512i low = _mm512_loadu_si512(group + part * kHalf);
    const __m512i pairs[] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    for (int v = 0; v < kVectors; v += 2) {
      out[v] = (vec::Float)_mm512_slli_epi32(pairs[v / 2], 16);
      out[v + 1] = (vec::Float)_mm512_and_si512(pairs[v / 2], _mm512_set1_epi32(-65536));
    }
  }

 private:
  typedef __m512i Whole;
#else
  void operator()(const uint8_t* group, int part, vec::Float (&out)[kVectors]) const {
    const int half = part / 2, quarter = part % 2 * 32;
    const __m256i codes = _mm256_srli_epi16(load(group + 2 * kHalf + quarter), 4 * half);
    const __m256i high = _mm256_shuffle_epi8(table_, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
    const __m256i low = load(group + half * kHalf + quarter);
    const __m256i pairs[] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    for (int v = 0; v < kVectors; v += 2) {
      out[v] = (vec::Float)_mm256_slli_epi32(pairs[v / 2], 16);
      out[v + 1] = (vec::Float)_mm256_and_si256(pairs[v / 2], _mm256_set1_epi32(-65536));
    }
  }

 private:
  typedef __m256i Whole;
  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
#endif
  Whole table_;  // upper bytes by code, once for each 16 bytes

 public:
  explicit Unpack(int64_t base) {
    uint8_t bytes[sizeof(Whole)];
    for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = upper_byte(i % 16, static_cast<int>(base));
    std::memcpy(&table_, bytes, sizeof table_);
  }
};
#endif

// A packed matrix from one of its rows on.
struct Rows {
  const uint8_t* data;
  int64_t bytes;         // of a row
  const int32_t* first;  // this row's first exception
  const Exception* exceptions;
  int64_t base;

  Rows(const void* matrix, int64_t row) {
    const auto* header = static_cast<const Header*>(matrix);
    first = reinterpret_cast<const int32_t*>(header + 1) + row;
    exceptions = reinterpret_cast<const Exception*>(reinterpret_cast<const int32_t*>(header + 1) + header->rows + 1);
    bytes = row_bytes(header->columns), base = header->base;
    data = static_cast<const uint8_t*>(matrix) + rows_offset(header->rows, header->exceptions) + row * bytes;
  }
  // What a packed row lacks of row . x.
  float exceptions_times(int64_t row, const float* x) const {
    float total = 0;
    for (int32_t i = first[row]; i < first[row + 1]; ++i) total += exceptions[i].value * x[exceptions[i].column];
    return total;
  }
};

}  // namespace packed
