// Products with an int8 cache in integers: queries and weights as fixed-point numbers of 16 bits, high and low byte
// apart, so that a word of four keys or elements takes one instruction for each byte. Sums of 32 bits are exact, so
// the only rounding is that of 16 bits, hundreds of times finer than that of the cache.
#pragma once

#include <cmath>

#include "scratch.h"

namespace dape::DAPE_ISA {

// Rows of a register tile: each needs twice the accumulators of floats.
using ByteRows = std::integer_sequence<int, 3, 2, 1>;

#if defined(__AVX512VNNI__)

constexpr bool kHasBytes = true;

// Sums of four products each, of unsigned by signed bytes.
inline Words dot_bytes(Words sum, Words bytes, Words signed_bytes) { return _mm512_dpbusd_epi32(sum, bytes, signed_bytes); }
inline Words splat_bytes(const uint8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}

// Store 16 numbers of 16 bits as bytes `plane` apart.
inline void store_planes(uint8_t* high, int64_t plane, __m512i numbers) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + plane), _mm512_cvtepi32_epi8(numbers));
}

// Store a query of bfloat16 [dim] as 2^15 + number, planes `dim` apart, and return what a number stands for.
inline float split_query(const uint16_t* query, int dim, uint8_t* target) {
    float largest = 0, sum = 0;
    for (int i = 0; i < dim; ++i) {
        const float x = widen(query[i]);
        largest = std::fabs(x) > largest ? std::fabs(x) : largest;
        sum += x;
    }
    const float factor = largest > 0 && largest < INFINITY ? 32767.0f / largest : 0.0f;
    for (int i = 0; i < dim; ++i) {
        const float x = widen(query[i]) * factor;
        const int number = 32768 + (x == x ? int(std::lrint(x)) : 0);
        target[i] = uint8_t(number >> 8);
        target[dim + i] = uint8_t(number);
    }
    // What is no number or infinite has to show in the result.
    return sum - sum == 0 ? largest / 32767.0f : NAN;
}

// Store weights of kTile keys, none below 0, planes kTile apart, and return what a number stands for.
template <int N>
inline float split_weights(const Floats (&weights)[N], uint8_t* target) {
    Floats highest = weights[0], sum = weights[0];
    unrolled<N - 1>([&](auto n) DAPE_INLINE_LAMBDA {
        highest = max(highest, weights[n + 1]);
        sum = sum + weights[n + 1];
    });
    const bool numbers = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0;
    const float largest = numbers ? max_lane(highest) : NAN;
    const Floats factor = splat(largest > 0 ? 65535.0f / largest : 0.0f);
    unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
        store_planes(target + n * kLanes, N * kLanes, _mm512_cvtps_epi32(weights[n] * factor));
    });
    return largest / 65535.0f;
}

// Scores of M queries and N vectors of keys, see `score_tile`. query: [M, 2, elements]; query_scales: [M].
template <int M, int N>
inline void byte_scores(const uint8_t* query, const float* query_scales, const uint32_t* const* keys,
                        const uint32_t* const* next, int words, const float* const* scales, float* out,
                        int64_t out_stride) {
    const int64_t plane = 4 * words;
    Words high[M][N] = {}, low[M][N] = {}, sum[N] = {};
    const Words ones = _mm512_set1_epi8(1);
    for (int w = 0; w < words; ++w) {
        Words word[N];
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
            word[n] = load(keys[n] + w * kPanel);
            sum[n] = dot_bytes(sum[n], ones, word[n]);
            if (next) prefetch(next[n] + w * kPanel);
        });
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
            const uint8_t* bytes = query + 2 * m * plane + 4 * w;
            const Words own_high = splat_bytes(bytes), own_low = splat_bytes(bytes + plane);
            unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
                high[m][n] = dot_bytes(high[m][n], own_high, word[n]);
                low[m][n] = dot_bytes(low[m][n], own_low, word[n]);
            });
        });
    }
    unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
        const Floats scale = load(scales[n]);
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
            // Queries are stored 2^15 too high.
            const Words centred = _mm512_sub_epi32(high[m][n], _mm512_slli_epi32(sum[n], 7));
            const Words total = _mm512_add_epi32(_mm512_slli_epi32(centred, 8), low[m][n]);
            store(out + m * out_stride + n * kLanes, _mm512_cvtepi32_ps(total) * (scale * splat(query_scales[m])));
        });
    });
}

// Outputs of M queries and N vectors of elements, see `output_tile`. weights: [M, stride], planes kTile apart, zero
// for keys that do not count; weight_scales: [M].
template <int M, int N>
inline void byte_outputs(const uint8_t* weights, int64_t weight_stride, const float* weight_scales,
                         const uint32_t* const* values, const uint32_t* const* next, int64_t value_stride, int count,
                         const float* fade, float* out, int64_t out_stride) {
    constexpr int kWords = kPanel / 4;
    Words high[M][N] = {}, low[M][N] = {};
    for (int w = 0; w < (count + 3) / 4; ++w) {
        const int64_t at = w % kWords * value_stride;
        Words word[N];
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
            word[n] = load(values[w / kWords] + at + n * kLanes);
            if (next) prefetch(next[w / kWords] + at + n * kLanes);
        });
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
            const uint8_t* bytes = weights + m * weight_stride + 4 * w;
            const Words own_high = splat_bytes(bytes), own_low = splat_bytes(bytes + kTile);
            unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
                high[m][n] = dot_bytes(high[m][n], own_high, word[n]);
                low[m][n] = dot_bytes(low[m][n], own_low, word[n]);
            });
        });
    }
    unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
        const Floats factor = splat(fade[m]), scale = splat(weight_scales[m]);
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
            float* target = out + m * out_stride + n * kLanes;
            const Words total = _mm512_add_epi32(_mm512_slli_epi32(high[m][n], 8), low[m][n]);
            store(target, fma(load(target), factor, _mm512_cvtepi32_ps(total) * scale));
        });
    });
}

#else

// Declared for code that is compiled for every instruction set and runs on none of these.
constexpr bool kHasBytes = false;
float split_query(const uint16_t* query, int dim, uint8_t* target);
template <int N>
float split_weights(const Floats (&weights)[N], uint8_t* target);
template <int M, int N>
void byte_scores(const uint8_t* query, const float* query_scales, const uint32_t* const* keys,
                 const uint32_t* const* next, int words, const float* const* scales, float* out, int64_t out_stride);
template <int M, int N>
void byte_outputs(const uint8_t* weights, int64_t weight_stride, const float* weight_scales,
                  const uint32_t* const* values, const uint32_t* const* next, int64_t value_stride, int count,
                  const float* fade, float* out, int64_t out_stride);

#endif

}  // namespace dape::DAPE_ISA
