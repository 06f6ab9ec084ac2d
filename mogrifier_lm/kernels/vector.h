// The processor's vectors of floats, 16 with AVX-512 and 8 with AVX2, stored as float or bf16, and
// what the kernels compute with them.

#pragma once
#if !defined(__AVX2__) || !defined(__FMA__)
#error "the kernels need a processor with AVX2 and FMA"
#endif
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef int64_t idx;
#ifdef __AVX512F__
constexpr idx LANES = 16;
#else
constexpr idx LANES = 8;  // vectors of 16, split by the compiler, took three times as long
#endif
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));
struct bf16 { uint16_t bits; };

template <class T, class P> static inline T get(const P* p) { T v; memcpy(&v, p, sizeof v); return v; }
static inline V load(const float* p) { return get<V>(p); }
static inline V load(const bf16* p) { return (V)(__builtin_convertvector(get<VH>(p), VU) << 16); }
static inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
static inline VU narrow(V v) {  // the bits of bf16: to nearest, ties to even; a NaN stays one
  VU u = (VU)v, quiet = {};
  return (v == v) ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : quiet + 0x7fc0;
}
static inline void store(bf16* p, V v) {
#ifdef __AVX512BF16__  // as narrow, but for subnormals, which become 0
  VH h = (VH)_mm512_cvtneps_pbh((__m512)v);
#else
  VH h = __builtin_convertvector(narrow(v), VH);
#endif
  memcpy(p, &h, sizeof h);
}

// 1 / x for normal x.
static inline V inverse(V x) {
#ifdef __AVX512F__  // an approximation and a Newton step: a third of the division's time
  V y = (V)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// e^x within 1e-7 relative on [-87, 87], the nearer end outside; NaN stays NaN.
static inline V exponential(V x) {
  const V zero = {};
  x = x < -87.0f ? zero - 87.0f : x;
  x = x > 87.0f ? zero + 87.0f : x;
  V shifted = x * 1.44269504f + 12582912.0f;  // the integer lands in the low bits
  V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f - n * -2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;  // Cephes expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  VI scale = ((VI)shifted - 0x4b400000 + 127) << 23;
  return p * (V)scale;  // times, not an addition to the exponent bits: that would unmake a NaN
}
