// Vectors of the instruction set that this file is compiled for. Everything lives in namespace
// dape::DAPE_ISA and is inline there, so that no code of one set is linked into another.
#pragma once

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
// GCC 12's own headers leave vectors uninitialised on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "abi.h"

#define DAPE_INLINE [[gnu::always_inline]] inline
#define DAPE_INLINE_LAMBDA __attribute__((always_inline))

namespace dape::DAPE_ISA {

// kLanes: floats in a vector. kColumns: vectors of keys (or of elements of a value) in a register tile;
// with kRows rows they fill the accumulators without spilling.
#if defined(__AVX512F__)

using Floats = __m512;
using Words = __m512i;
constexpr int kLanes = 16, kColumns = 4, kRows = 6;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float max_lane(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
inline bool any_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline Floats where_above(Floats a, Floats b, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
// Lanes first to last - 1 of x (both 0 to kLanes), `other` elsewhere.
inline Floats keep(Floats x, int first, int last, Floats other) {
    return _mm512_mask_blend_ps(__mmask16((1u << last) - (1u << first)), other, x);
}
inline Floats times_power(Floats x, Floats exponent) { return _mm512_scalef_ps(x, exponent); }
inline Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <int G>
inline Floats lane(Words w, int k) {
    if constexpr (G == 1) return _mm512_castsi512_ps(w);
    else if constexpr (G == 2)
        return _mm512_castsi512_ps(k ? _mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u))) : _mm512_slli_epi32(w, 16));
    else return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(w, _mm_cvtsi32_si128(24 - 8 * k)), 24));
}
inline Floats high_byte(Words w, int k) {
    if (k == 3) return _mm512_cvtepi32_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xff000000u))));
    // Byte k of the first word, behind three bytes of zeros; the same in each of four words.
    const __m512i place = _mm512_add_epi8(_mm512_set4_epi32(0x0c808080, 0x08808080, 0x04808080, 0x00808080),
                                          _mm512_set1_epi32(k << 24));
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(w, place));
}

#elif defined(__AVX2__) && defined(__FMA__)

using Floats = __m256;
using Words = __m256i;
constexpr int kLanes = 8, kColumns = 2, kRows = 6;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Words load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline float max_lane(Floats x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float sum_lanes(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline bool any_above(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline Floats where_above(Floats a, Floats b, Floats yes, Floats no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline Floats keep(Floats x, int first, int last, Floats other) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), index),
                                               _mm256_cmpgt_epi32(_mm256_set1_epi32(last), index));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(inside));
}
// Exact for exponents -126 to 127; zero below.
inline Floats times_power(Floats x, Floats exponent) {
    const Floats low = _mm256_set1_ps(-126.0f);
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(max(exponent, low)), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(x * _mm256_castsi256_ps(power), _mm256_cmp_ps(exponent, low, _CMP_NLT_UQ));
}
inline Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <int G>
inline Floats lane(Words w, int k) {
    if constexpr (G == 1) return _mm256_castsi256_ps(w);
    else if constexpr (G == 2)
        return _mm256_castsi256_ps(k ? _mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u))) : _mm256_slli_epi32(w, 16));
    else return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(w, _mm_cvtsi32_si128(24 - 8 * k)), 24));
}
inline Floats high_byte(Words w, int k) {
    if (k == 3) return _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xff000000u))));
    const __m256i place = _mm256_add_epi8(_mm256_set_epi32(0x0c808080, 0x08808080, 0x04808080, 0x00808080, 0x0c808080,
                                                           0x08808080, 0x04808080, 0x00808080),
                                          _mm256_set1_epi32(k << 24));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(w, place));
}

#else  // any processor, by GCC's vector extension

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
constexpr int kLanes = 4, kColumns = 2, kRows = 4;

inline Floats load(const float* p) { Floats x; __builtin_memcpy(&x, p, sizeof x); return x; }
inline Words load(const uint32_t* p) { Words x; __builtin_memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats where_above(Floats a, Floats b, Floats yes, Floats no) { return a > b ? yes : no; }
inline Floats max(Floats a, Floats b) { return where_above(a, b, a, b); }
inline float max_lane(Floats x) {
    float top = x[0];
    for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
}
inline float sum_lanes(Floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline bool any_above(Floats a, Floats b) {
    const Integers above = a > b;
    return (above[0] | above[1] | above[2] | above[3]) != 0;
}
inline Floats keep(Floats x, int first, int last, Floats other) {
    const Integers index{0, 1, 2, 3};
    return (index >= first) & (index < last) ? x : other;
}
// Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
constexpr float kRounder = 12582912.0f;
inline Floats round(Floats x) {
    const Floats inside = where_above(x, splat(-4194304.0f), x, splat(-4194304.0f));
    return (inside + kRounder) - kRounder;
}
inline Floats times_power(Floats x, Floats exponent) {
    const Floats low = splat(-126.0f);
    const Integers power = ((Integers)(max(exponent, low) + kRounder) + 127) << 23;
    return exponent < low ? splat(0.0f) : x * (Floats)power;
}
template <int G>
inline Floats lane(Words w, int k) {
    if constexpr (G == 1) return (Floats)w;
    else if constexpr (G == 2) return (Floats)(k ? w & 0xffff0000u : w << 16);
    else return __builtin_convertvector((Integers)(w << (24 - 8 * k)) >> 24, Floats);
}
inline Floats high_byte(Words w, int k) { return __builtin_convertvector((Integers)(w << (24 - 8 * k) & 0xff000000u), Floats); }

#endif

// What `high_byte` makes of one: a byte there is cheaper to widen than a byte in its place.
constexpr float kHighByte = 16777216.0f;

// 2^x for x <= 127, relative error 2e-7; zero for x far below -126.
inline Floats exp2(Floats x) {
    const Floats whole = round(x);
    const Floats part = x - whole;
    Floats y = splat(0.00132647273f);
    y = fma(y, part, splat(0.00967151299f));
    y = fma(y, part, splat(0.0555073359f));
    y = fma(y, part, splat(0.240222424f));
    y = fma(y, part, splat(0.693147004f));
    y = fma(y, part, splat(1.0f));
    return times_power(y, whole);
}

// Call `body` with 0 to Count - 1 as compile-time constants. Unlike a loop, which GCC unrolls too late for that,
// this leaves arrays of vectors in registers.
template <int Count, class Body>
DAPE_INLINE void unrolled(Body&& body) {
    [&]<int... I>(std::integer_sequence<int, I...>) DAPE_INLINE_LAMBDA {
        (body(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, Count>{});
}

// Call `body` with the largest of Sizes (falling, down to 1) that is at most `left`, as a compile-time constant,
// and return it: the body is compiled for few sizes, whatever the remainder.
template <int Size, int... Smaller, class Body>
DAPE_INLINE int with_largest(std::integer_sequence<int, Size, Smaller...>, int left, Body&& body) {
    if constexpr (sizeof...(Smaller) > 0)
        if (left < Size) return with_largest(std::integer_sequence<int, Smaller...>{}, left, body);
    body(std::integral_constant<int, Size>{});
    return Size;
}

// Register tiles by rows and by vectors of columns.
using Rows = std::conditional_t<kRows == 6, std::integer_sequence<int, 6, 4, 2, 1>, std::integer_sequence<int, 4, 2, 1>>;
using Columns = std::conditional_t<kColumns == 4, std::integer_sequence<int, 4, 2, 1>, std::integer_sequence<int, 2, 1>>;

}  // namespace dape::DAPE_ISA
