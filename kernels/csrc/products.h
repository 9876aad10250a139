// The matrix products of a tile as register tiles: M rows by N vectors of accumulators.
#pragma once

#include "simd.h"

namespace dape::DAPE_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHasBfloat16 = true;
#else
constexpr bool kHasBfloat16 = false;
#endif

#if defined(__AVX512BF16__)
inline Floats dot_pairs(Floats sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline Words splat_word(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}
// Words of bfloat16: `even` in the low halves, `odd` in the high ones.
inline Words pair_words(Floats even, Floats odd) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
// The same of numbers that bfloat16 holds exactly.
inline Words exact_pairs(Floats even, Floats odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}
inline Words low_halves(Words words) { return _mm512_and_si512(words, _mm512_set1_epi32(0xffff)); }
inline void store_words(uint32_t* p, Words words) { _mm512_storeu_si512(p, words); }
#else
// Declared for code that is compiled for every instruction set and runs on none of these.
Floats dot_pairs(Floats sum, Words a, Words b);
Words splat_word(const void* p);
Words pair_words(Floats even, Floats odd);
Words exact_pairs(Floats even, Floats odd);
Words low_halves(Words words);
void store_words(uint32_t* p, Words words);
#endif

// Fetch the line that holds `p` into the first-level cache.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// sum[m][n] += sum over elements of row[m] * column[n], for M rows and N vectors of columns.
//   rows: [M, stride] float, or bfloat16 if Pairs; columns: start of each vector's column of words;
//   next: columns that are needed after these, fetched on the way (null: none);
//   High: elements are int8 and count kHighByte times.
template <int G, bool Pairs, bool High = false, int M, int N>
DAPE_INLINE void multiply(Floats (&sum)[M][N], const void* rows, int64_t stride, const uint32_t* const* columns,
                          const uint32_t* const* next, int words) {
    for (int w = 0; w < words; ++w) {
        Words word[N];
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { word[n] = load(columns[n] + w * kPanel); });
        if (next)
            for (int n = 0; n < N; n += kPanel / kLanes) prefetch(next[n] + w * kPanel);
        if constexpr (Pairs) {
            const auto* pair = static_cast<const uint16_t*>(rows) + 2 * w;
            unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
                const Words x = splat_word(pair + m * stride);
                unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = dot_pairs(sum[m][n], x, word[n]); });
            });
        } else {
            const auto* element = static_cast<const float*>(rows) + G * w;
            unrolled<G>([&](auto k) DAPE_INLINE_LAMBDA {
                Floats y[N];
                unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
                    if constexpr (High) y[n] = high_byte(word[n], k);
                    else y[n] = lane<G>(word[n], k);
                });
                unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
                    const Floats x = splat(element[m * stride + k]);
                    unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = fma(x, y[n], sum[m][n]); });
                });
            });
        }
    }
}

// Scores of M queries and N vectors of keys: out[m][n] = sum over elements of query[m] * key, see `multiply`.
//   scales: of each vector's keys, int8 only.
template <int G, bool Pairs, int M, int N>
inline void score_tile(const void* query, int64_t query_stride, const uint32_t* const* keys,
                       const uint32_t* const* next, int words, const float* const* scales, float* out,
                       int64_t out_stride) {
    Floats sum[M][N];
    unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = splat(0.0f); });
    });
    multiply<G, Pairs>(sum, query, query_stride, keys, next, words);
    unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
            if constexpr (G == 4) sum[m][n] = sum[m][n] * load(scales[n]);
            store(out + m * out_stride + n * kLanes, sum[m][n]);
        });
    });
}

// Outputs of M queries and N vectors of elements: out[m] = out[m] * fade[m] + sum over keys of weight * value.
//   weights: [M, stride] float, or bfloat16 if Pairs, by key; values: words of each panel of keys, at the
//   first element wanted; count: keys, the last panel may be used in part, and what lies behind is not read
//   into any sum: it may be anything; next: panels that are needed after these (null: none).
template <int G, bool Pairs, int M, int N>
inline void output_tile(const void* weights, int64_t weight_stride, const uint32_t* const* values,
                        const uint32_t* const* next, int64_t value_stride, int count, const float* fade, float* out,
                        int64_t out_stride) {
    constexpr int kWords = kPanel / G;  // words of a panel in the direction of keys
    Floats sum[M][N];
    unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = splat(0.0f); });
    });
    // Add the keys of word w, of which the first `present` count.
    const auto add = [&](int w, auto present) DAPE_INLINE_LAMBDA {
        const int64_t at = w % kWords * value_stride;
        Words word[N];
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { word[n] = load(values[w / kWords] + at + n * kLanes); });
        if (next)
            for (int n = 0; n < N; n += kPanel / kLanes) prefetch(next[w / kWords] + at + n * kLanes);
        if constexpr (Pairs) {
            if constexpr (present < G)
                unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { word[n] = low_halves(word[n]); });
            const auto* pair = static_cast<const uint16_t*>(weights) + 2 * w;
            unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
                const Words weight = splat_word(pair + m * weight_stride);
                unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = dot_pairs(sum[m][n], weight, word[n]); });
            });
        } else {
            const auto* weight = static_cast<const float*>(weights) + G * w;
            unrolled<present>([&](auto k) DAPE_INLINE_LAMBDA {
                Floats value[N];
                unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { value[n] = lane<G>(word[n], k); });
                unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
                    const Floats x = splat(weight[m * weight_stride + k]);
                    unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = fma(x, value[n], sum[m][n]); });
                });
            });
        }
    };
    for (int w = 0; w < count / G; ++w) add(w, std::integral_constant<int, G>{});
    if constexpr (G > 1)
        if (count % G)
            with_largest(std::conditional_t<G == 4, std::integer_sequence<int, 3, 2, 1>,
                                            std::integer_sequence<int, 1>>{},
                         count % G, [&](auto present) DAPE_INLINE_LAMBDA { add(count / G, present); });
    // The outputs so far come last: at the start, every key would be rounded at their size.
    unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
        const Floats factor = splat(fade[m]);
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA {
            float* at = out + m * out_stride + n * kLanes;
            store(at, fma(load(at), factor, sum[m][n]));
        });
    });
}

// One layer of the score network on M outputs and N vectors of keys:
// sum[m][n] += weight[tap, channel, m] * in[channel][column n + tap].
//   in: [channels, stride]; weight: [taps, channels, outs], at the first output wanted.
template <int M, int N>
DAPE_INLINE void mix(Floats (&sum)[M][N], const float* in, int64_t stride, int channels, int taps,
                     const float* weight, int64_t outs) {
    const float* x = in;
    // One loop for taps and channels, so that the sums stay in registers.
    for (int left = taps * channels, channel = 0; left; --left) {
        Floats own[N];
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { own[n] = load(x + n * kLanes); });
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
            const Floats w = splat(weight[m]);
            unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = fma(w, own[n], sum[m][n]); });
        });
        weight += outs;
        x += stride;
        if (taps > 1 && ++channel == channels) {
            channel = 0;
            x = ++in;
        }
    }
}

// The same on words of two channels, without taps. in: [pairs, stride] words; weight: [pairs, outs] words.
template <int M, int N>
DAPE_INLINE void mix_pairs(Floats (&sum)[M][N], const uint32_t* in, int64_t stride, int pairs,
                           const uint32_t* weight, int64_t outs) {
    for (int pair = 0; pair < pairs; ++pair) {
        Words own[N];
        unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { own[n] = load(in + pair * stride + n * kLanes); });
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA {
            const Words w = splat_word(weight + pair * outs + m);
            unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { sum[m][n] = dot_pairs(sum[m][n], w, own[n]); });
        });
    }
}

}  // namespace dape::DAPE_ISA
