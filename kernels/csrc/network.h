// The score network on one row of a tile: [A] + residual + W2 leaky(W1 A + hidden) of all heads.
#pragma once

#include "matrix.h"
#include "positional.h"

namespace dape::DAPE_ISA {

// Kernels longer than 1 run one panel behind: the scores right of a column must be known before it. A row of
// scores then holds the last kCarry columns of the tile before, and room for whole vectors behind its own.
constexpr int kCarry = 2 * kPanel;
constexpr int kWindow = kCarry + kTile + kPanel;
constexpr float kLeakySlope = 0.01f;

inline Floats leaky(Floats x) { return max(x, x * splat(kLeakySlope)); }

template <bool Pairs>
class Network {
    static constexpr int kGroup = kColumns * kLanes;  // columns of a register tile
    static constexpr int kHiddenStride = kTile + 2 * kPanel;

  public:
    Network(const Encoding& encoding, int heads, Arena& arena) : e_(encoding), heads_(heads) {
        if (!e_.width) return;
        hidden_ = arena.take<float>(e_.width * (convolves() ? kHiddenStride : kGroup));
        if (!paired()) return;
        scores_ = arena.take<uint32_t>(score_depth() / 2 * kGroup);
        pairs_ = arena.take<uint32_t>(hidden_depth() / 2 * kGroup);
        first_ = arena.take<uint32_t>(score_depth() / 2 * e_.width);
        second_ = arena.take<uint32_t>(hidden_depth() / 2 * padded_heads());
        adapted_ = on_matrix() ? arena.take<float>(padded_heads() * kTile) : nullptr;
    }

    bool convolves() const { return e_.width && e_.kernel > 1; }
    // Channels of scores in a row, and floats from one to the next.
    int inputs() const { return convolves() ? e_.inputs : heads_; }
    int score_stride() const { return convolves() ? kWindow : kTile; }

    // Whether bfloat16 products are used. Then scores come unscaled, with the scale in the weights.
    bool paired() const { return Pairs && e_.width && e_.kernel == 1 && e_.width % 4 == 0; }

    // Whether its products are those of matrix units.
    bool on_matrix() const { return kHasMatrix && paired() && e_.width % kMatrix == 0; }

    // Must be called before `adapt`.
    void load_weights() {
        if constexpr (!Pairs) return;
        if (!paired()) return;
        if (on_matrix()) {
            rows(e_.first, heads_, e_.width, e_.query_scale, score_depth(), e_.width, first_);
            rows(e_.second, e_.width, heads_, 1.0f, hidden_depth(), padded_heads(), second_);
            // Inputs that only fill up the depth.
            __builtin_memset(scores_, 0, score_depth() / 2 * kGroup * sizeof *scores_);
            __builtin_memset(pairs_, 0, hidden_depth() / 2 * kGroup * sizeof *pairs_);
        } else {
            words(e_.first, heads_, e_.width, e_.query_scale, first_);
            words(e_.second, e_.width, heads_, 1.0f, second_);
        }
    }

    // Before a tile: keep the last columns of the one before. Kernels longer than 1 only.
    void carry(float* scores, int64_t row_stride, int rows) const {
        for (int row = 0; row < rows; ++row)
            for (int channel = 0; channel < e_.inputs; ++channel) {
                float* window = scores + row * row_stride + channel * kWindow;
                __builtin_memcpy(window, window + kTile, kCarry * sizeof(float));
            }
    }

    // Fill in the biases beside a row's scores and clear what lies right of its last visible column, as the
    // convolutions see zeros there. Kernels longer than 1 only.
    void set_inputs(float* scores, PositionalRows& positional, int row, int64_t first, int visible) const {
        if (e_.inputs > heads_) {
            const float* bias = positional.of(row, first);
            for (int head = 0; head < heads_; ++head)
                __builtin_memcpy(scores + (heads_ + head) * kWindow + kCarry, bias + head * positional.stride(),
                                 kTile * sizeof(float));
        }
        for (int channel = 0; channel < e_.inputs; ++channel)
            __builtin_memset(scores + channel * kWindow + kCarry + visible, 0, (kTile - visible) * sizeof(float));
    }

    // Write the adapted scores [H, kTile] of a row. Columns from `visible` on may hold anything. For kernels
    // longer than 1, `first` is where the scores start, and the adapted ones start one panel earlier.
    void adapt(const float* scores, PositionalRows& positional, int row, int64_t first, int visible,
               float* adapted) const {
        if (convolves()) return convolve(scores, first, adapted);
        if (!positional.channels()) return;
        const float* fixed = positional.of(row, first);
        const int64_t stride = positional.stride();
        if (!e_.width) return add(fixed, stride, adapted);
        for (int column = 0; column < visible; column += kGroup) {
            if constexpr (Pairs)
                if (paired()) {
                    pack_scores(scores + column);
                    const auto layers = on_matrix() ? &Network::adapt_matrix : &Network::adapt_pairs;
                    (this->*layers)(scores + column, fixed + column, stride, adapted + column);
                    continue;
                }
            adapt_floats(scores + column, fixed + column, stride, adapted + column);
        }
    }

  private:
    static int round_up(int count, int step) { return (count + step - 1) / step * step; }
    // Inputs of the layers, filled up to what the products take at a time, and outputs of the second.
    int score_depth() const { return round_up(heads_, on_matrix() ? kDepth : 2); }
    int hidden_depth() const { return on_matrix() ? round_up(e_.width, kDepth) : e_.width; }
    int padded_heads() const { return on_matrix() ? round_up(heads_, kMatrix) : heads_; }

    // Outputs of a register tile if so many are left: eight are two halves rather than most and a small remainder.
    static int block(int left) { return int(least(left == 8 ? 4 : kRows, left)); }

    template <int M, int N, class Body>
    DAPE_INLINE static void each(Body body) {
        unrolled<M>([&](auto m) DAPE_INLINE_LAMBDA { unrolled<N>([&](auto n) DAPE_INLINE_LAMBDA { body(m, n); }); });
    }

    // One layer on N vectors of columns; finish(out, m, sum) takes the results [m, N] of the outputs from `out` on. It
    // is inlined, and what `finish` captures are values: members would be loaded again after every store.
    template <int N, class Finish>
    DAPE_INLINE static void layer(const float* in, int64_t stride, int channels, int taps, const float* weight,
                                  int outs, Finish finish) {
        for (int out = 0; out < outs;)
            out += with_largest(Rows{}, block(outs - out), [&](auto m) DAPE_INLINE_LAMBDA {
                Floats sum[m][N];
                each<m, N>([&](auto i, auto n) DAPE_INLINE_LAMBDA { sum[i][n] = splat(0.0f); });
                mix<m, N>(sum, in, stride, channels, taps, weight + out, outs);
                finish(out, m, sum);
            });
    }

    void add(const float* fixed, int64_t stride, float* scores) const {
        for (int head = 0; head < heads_; ++head)
            for (int i = 0; i < kTile; i += kLanes) {
                float* score = scores + head * kTile + i;
                store(score, load(score) + load(fixed + head * stride + i));
            }
    }

    void adapt_floats(const float* scores, const float* fixed, int64_t stride, float* adapted) const {
        float* const hidden = hidden_;
        const int heads = heads_, width = e_.width;
        const bool keeps = e_.keeps_scores;
        layer<kColumns>(scores, kTile, heads, 1, e_.first, width, [=](int out, auto m, auto& sum) DAPE_INLINE_LAMBDA {
            const float* own = fixed + out * stride;
            float* target = hidden + out * kGroup;
            each<m, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                store(target + i * kGroup + n * kLanes, leaky(sum[i][n] + load(own + i * stride + n * kLanes)));
            });
        });
        // The residual comes last: at the start, every product would be rounded at the size of the score.
        layer<kColumns>(hidden, kGroup, width, 1, e_.second, heads, [=](int out, auto m, auto& sum) DAPE_INLINE_LAMBDA {
            const float *own = fixed + (width + out) * stride, *score = scores + out * kTile;
            float* target = adapted + out * kTile;
            each<m, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                Floats residual = load(own + i * stride + n * kLanes);
                if (keeps) residual = residual + load(score + i * kTile + n * kLanes);
                store(target + i * kTile + n * kLanes, sum[i][n] + residual);
            });
        });
    }

    void convolve(const float* scores, int64_t first, float* adapted) const {
        const int reach = e_.kernel / 2, columns = kTile + 2 * reach;
        const float* const bias = e_.hidden_bias;
        // Column 0 of the hidden values lies `reach` before the first adapted column.
        const float* in = scores + kCarry - kPanel - 2 * reach;
        for (int column = 0; column < columns;)
            column += kLanes * with_largest(Columns{}, (columns - column + kLanes - 1) / kLanes, [&](auto count) {
                float* const hidden = hidden_ + column;
                layer<count>(in + column, kWindow, e_.inputs, e_.kernel, e_.first, e_.width,
                             [=](int out, auto m, auto& sum) DAPE_INLINE_LAMBDA {
                                 each<m, count>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                                     store(hidden + (out + i) * kHiddenStride + n * kLanes,
                                           leaky(sum[i][n] + splat(bias[out + i])));
                                 });
                             });
            });
        const int before = clip(kPanel + reach - first, 0, kPanel + reach);  // columns left of position 0
        for (int out = 0; out < e_.width; ++out)
            __builtin_memset(hidden_ + out * kHiddenStride, 0, before * sizeof(float));
        for (int column = 0; column < kTile; column += kGroup) {
            const float* const own = scores + kCarry - kPanel + column;
            // Of the residuals that are kept, how far the biases lie behind the scores.
            const int64_t bias = e_.keeps_bias && e_.inputs > heads_ ? heads_ * kWindow : 0;
            const float* const constant = e_.out_bias;
            const bool keeps = e_.keeps_scores;
            layer<kColumns>(hidden_ + column, kHiddenStride, e_.width, e_.kernel, e_.second, heads_,
                            [=](int out, auto m, auto& sum) DAPE_INLINE_LAMBDA {
                                const float* score = own + out * kWindow;
                                float* target = adapted + out * kTile + column;
                                each<m, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                                    const int at = i * kWindow + n * kLanes;
                                    Floats x = splat(constant[out + i]);
                                    if (keeps) x = x + load(score + at);
                                    if (bias) x = x + load(score + bias + at);
                                    store(target + i * kTile + n * kLanes, x + sum[i][n]);
                                });
                            });
        }
    }

    // Weights [channels, outs] as words of two adjacent channels, for every output; a missing last one is zero.
    static void words(const float* weight, int channels, int outs, float factor, uint32_t* target) {
        for (int channel = 0; channel < channels; channel += 2)
            for (int out = 0; out < outs; ++out) {
                const float* even = weight + channel * outs + out;
                const uint32_t odd = channel + 1 < channels ? narrow(factor * even[outs]) : 0;
                target[channel / 2 * outs + out] = narrow(factor * *even) | odd << 16;
            }
    }

    // The same as rows of outputs [padded outs, depth], filled up with zeros.
    static void rows(const float* weight, int channels, int outs, float factor, int depth, int padded,
                     uint32_t* target) {
        auto* row = reinterpret_cast<uint16_t*>(target);
        for (int out = 0; out < padded; ++out, row += depth)
            for (int channel = 0; channel < depth; ++channel)
                row[channel] = out < outs && channel < channels ? narrow(factor * weight[channel * outs + out]) : 0;
    }

    void pack_scores(const float* scores) const {
        for (int head = 0; head < heads_; head += 2)
            for (int n = 0; n < kColumns; ++n) {
                const float* even = scores + head * kTile + n * kLanes;
                const Floats odd = head + 1 < heads_ ? load(even + kTile) : splat(0.0f);
                store_words(scores_ + head / 2 * kGroup + n * kLanes, pair_words(load(even), odd));
            }
    }

    void adapt_pairs(const float* scores, const float* fixed, int64_t stride, float* adapted) const {
        for (int out = 0; out < e_.width; out += 4) {
            Floats sum[4][kColumns];
            each<4, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                sum[i][n] = load(fixed + (out + i) * stride + n * kLanes);
            });
            mix_pairs<4, kColumns>(sum, scores_, kGroup, score_depth() / 2, first_ + out, e_.width);
            each<2, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                store_words(pairs_ + (out / 2 + i) * kGroup + n * kLanes,
                            pair_words(leaky(sum[2 * i][n]), leaky(sum[2 * i + 1][n])));
            });
        }
        for (int out = 0; out < heads_;)
            out += with_largest(Rows{}, block(heads_ - out), [&](auto m) DAPE_INLINE_LAMBDA {
                Floats sum[m][kColumns];
                each<m, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                    sum[i][n] = load(fixed + (e_.width + out + i) * stride + n * kLanes);
                });
                mix_pairs<m, kColumns>(sum, pairs_, kGroup, hidden_depth() / 2, second_ + out, heads_);
                each<m, kColumns>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                    finish_pair(scores, out + i, n, sum[i][n], adapted);
                });
            });
    }

    void adapt_matrix(const float* scores, const float* fixed, int64_t stride, float* adapted) const {
        const auto* first = reinterpret_cast<const uint16_t*>(first_);
        const auto* second = reinterpret_cast<const uint16_t*>(second_);
        for (int out = 0; out < e_.width; out += kMatrix)
            matrix_layer(fixed + out * stride, stride, first + out * score_depth(), scores_, score_depth(),
                         hidden_ + out * kTile);
        for (int out = 0; out < e_.width; out += 2)
            for (int n = 0; n < kColumns; ++n) {
                const float* even = hidden_ + out * kTile + n * kLanes;
                store_words(pairs_ + out / 2 * kGroup + n * kLanes,
                            pair_words(leaky(load(even)), leaky(load(even + kTile))));
            }
        for (int out = 0; out < heads_; out += kMatrix)
            matrix_layer(fixed + (e_.width + out) * stride, stride, second + out * hidden_depth(), pairs_,
                         hidden_depth(), adapted_ + out * kTile);
        for (int head = 0; head < heads_; ++head)
            for (int n = 0; n < kColumns; ++n)
                finish_pair(scores, head, n, load(adapted_ + head * kTile + n * kLanes), adapted);
    }

    // Add the residual of the unscaled scores.
    void finish_pair(const float* scores, int head, int n, Floats sum, float* adapted) const {
        const int at = head * kTile + n * kLanes;
        store(adapted + at, e_.keeps_scores ? fma(load(scores + at), splat(e_.query_scale), sum) : sum);
    }

    const Encoding& e_;
    const int heads_;
    float* hidden_ = nullptr;     // [D, columns]
    uint32_t* scores_ = nullptr;  // [pairs of heads, columns]
    uint32_t* pairs_ = nullptr;   // [pairs of hidden outputs, columns]
    uint32_t* first_ = nullptr;   // weights as words of two inputs: [pairs, outputs], on matrix units
    uint32_t* second_ = nullptr;  // [outputs, pairs]
    float* adapted_ = nullptr;    // [padded H, columns], on matrix units
};

}  // namespace dape::DAPE_ISA
