// Linear layers with what follows them, and norms. Compiled once per instruction set.

#include "linear.h"

#include <cmath>

#include "matrix.h"

namespace dape::DAPE_ISA {

namespace {

// Rows and inputs that are multiplied at a time, so that both factors stay in the first-level cache.
constexpr int kRowBlock = 48, kInputs = 128;

// Inputs of int8 weights that are made bfloat16 for matrix units at a time.
constexpr int kMatrixInputs = 128;

// Half the complementary error function of |x| / sqrt(2): Abramowitz and Stegun 7.1.26, error 1e-7.
Floats upper_tail(Floats x) {
    const Floats size = max(x, -x);
    const Floats t = splat(1.0f) / fma(size, splat(0.231641888f), splat(1.0f));
    Floats y = splat(0.530702714f);
    y = fma(y, t, splat(-0.726576013f));
    y = fma(y, t, splat(0.710706870f));
    y = fma(y, t, splat(-0.142248368f));
    y = fma(y, t, splat(0.127414796f));
    // exp(-x^2 / 2); the bound keeps the exponent within the range of exp2.
    return y * t * exp2(max(x * x * splat(-0.721347520f), splat(-200.0f)));
}

// x times the normal distribution function of x.
Floats gelu(Floats x) {
    const Floats tail = x * upper_tail(x);
    return where_above(x, splat(0.0f), x - tail, tail);
}

// The same by the approximation 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), of the distribution function.
Floats gelu_tanh(Floats x) {
    // The factor is 2 sqrt(2 / pi) log2(e); the bound keeps the exponent within the range of exp2.
    const Floats u = x * fma(x * x, splat(0.044715f), splat(1.0f)) * splat(-2.302208198f);
    return x / (splat(1.0f) + exp2(max(splat(-120.0f), -max(splat(-120.0f), -u))));
}

// The first `count` lanes of x at `target`.
void store_some(float* target, Floats x, int count) {
    if (count >= kLanes) return store(target, x);
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < count; ++i) target[i] = lanes[i];
}

void store_some(uint16_t* target, Floats x, int count) {
#if defined(__AVX512BF16__)
    if (count >= kLanes)
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(x));
#endif
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < count && i < kLanes; ++i) target[i] = narrow(lanes[i]);
}

Floats load_some(const float* source, int count) {
    if (count >= kLanes) return load(source);
    float lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = source[i];
    return load(lanes);
}

void store_row(const Activations& target, int64_t row, int64_t column, Floats x, int count) {
    const int64_t at = row * target.stride + column;
    if (target.type == kBfloat16) store_some(static_cast<uint16_t*>(target.data) + at, x, count);
    else store_some(static_cast<float*>(target.data) + at, x, count);
}

// Take the sums of one row and the outputs from `output` on.
void finish(const Linear& layer, const Activations& target, Action action, int64_t row, int64_t output, Floats x) {
    const int count = int(least(kLanes, layer.outputs - output));
    if (count <= 0) return;
    if (layer.scale) x = x * (load(layer.scale + output) * splat(1.0f / kHighByte));
    if (layer.bias) x = x + load(layer.bias + output);
    if (action == kStoreGelu) x = gelu(x);
    if (action == kStoreGeluTanh) x = gelu_tanh(x);
    if (action == kAdd) x = x + load_some(static_cast<const float*>(target.data) + row * target.stride + output, count);
    store_row(target, row, output, x, count);
}

// Words of some inputs, G in a word, as words of L: floats, or pairs of bfloat16, which hold any int8 exactly. int8 count
// kHighByte times. As many words behind them are fetched on the way.
template <int G, int L>
void convert(const uint32_t* column, int words, uint32_t* out) {
    for (int w = 0; w < words; ++w) {
        const Words word = load(column + w * kPanel);
        prefetch(column + (words + w) * kPanel);
        const auto number = [&](int k) DAPE_INLINE_LAMBDA {
            if constexpr (G == 4) return high_byte(word, k);
            else return lane<G>(word, k);
        };
        unrolled<G / L>([&](auto i) DAPE_INLINE_LAMBDA {
            uint32_t* const at = out + (w * (G / L) + i) * kPanel;
            if constexpr (L == 1) store(reinterpret_cast<float*>(at), number(i));
            else store_words(at, exact_pairs(number(2 * i), number(2 * i + 1)));
        });
    }
}

// Rows of floats, or of bfloat16 if Pairs, times kColumns vectors of outputs, whose weights lie G in a word.
template <int G, bool Pairs>
class Block {
  public:
    Block(const Linear& layer, const Activations& x, const Activations& target, Action action)
        : layer_(layer), x_(x), target_(target), action_(action), words_(layer.inputs / G) {}

    void run(int64_t first_row, int rows, int64_t output) {
        const uint32_t* columns[kColumns];
        for (int n = 0; n < kColumns; ++n) {
            const int64_t at = output + n * kLanes;
            columns[n] = layer_.weight + at / kPanel * words_ * kPanel + at % kPanel;
        }
        // Few rows: nothing is read twice, so nothing has to stay in the cache.
        if constexpr (kUnconverted > 0)
            if (rows <= kRows) return multiply_inputs<G>(first_row, rows, output, columns, 0, int(words_), true);
        for (int64_t word = 0; word < words_; word += kInputs / G) {
            const int count = int(least(words_ - word, kInputs / G));
            const bool ends = word + count == words_;
            const uint32_t* piece[kColumns];
            for (int n = 0; n < kColumns; ++n) piece[n] = columns[n] + word * kPanel;
            if constexpr (kUnconverted > 0)
                if (rows <= kUnconverted) {
                    multiply_inputs<G>(first_row, rows, output, piece, int(word), count, ends);
                    continue;
                }
            if constexpr (G != kFactors) {
                for (int n = 0; n < kColumns; ++n) {
                    convert<G, kFactors>(piece[n], count, converted_[n]);
                    piece[n] = converted_[n];
                }
                constexpr int kRatio = G / kFactors;
                multiply_inputs<kFactors>(first_row, rows, output, piece, int(kRatio * word), kRatio * count, ends);
            }
        }
    }

  private:
    // Numbers in a word as they are multiplied.
    static constexpr int kFactors = Pairs ? 2 : 1;
    // Up to so many rows every register tile converts the weights for itself, which is less work than to keep them.
    static constexpr int kUnconverted = G == kFactors ? kRowBlock : Pairs ? 0 : (G == 2 ? 4 : 2) * kRows;

    template <int L>
    void multiply_inputs(int64_t first_row, int rows, int64_t output, const uint32_t* const* columns, int word,
                         int words, bool ends) {
        const char* x = static_cast<const char*>(x_.data) + (first_row * x_.stride + word * L) * (Pairs ? 2 : 4);
        for (int row = 0; row < rows;)
            row += with_largest(Rows{}, rows - row, [&](auto m) {
                Floats sum[m][kColumns];
                each<m>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                    sum[i][n] = word ? load(&partial_[row + i][n * kLanes]) : splat(0.0f);
                });
                multiply<L, Pairs, L == 4>(sum, x + row * x_.stride * (Pairs ? 2 : 4), x_.stride, columns, nullptr, words);
                each<m>([&](auto i, auto n) DAPE_INLINE_LAMBDA {
                    if (ends) finish(layer_, target_, action_, first_row + row + i, output + n * kLanes, sum[i][n]);
                    else store(&partial_[row + i][n * kLanes], sum[i][n]);
                });
            });
    }

    template <int M, class Body>
    DAPE_INLINE static void each(Body body) {
        unrolled<M>([&](auto i) DAPE_INLINE_LAMBDA { unrolled<kColumns>([&](auto n) DAPE_INLINE_LAMBDA { body(i, n); }); });
    }

    const Linear& layer_;
    const Activations& x_;
    const Activations& target_;
    const Action action_;
    const int64_t words_;
    float partial_[kRowBlock][kColumns * kLanes];
    uint32_t converted_[kColumns][kInputs / kFactors * kPanel];
};

template <int G, bool Pairs>
void multiply_blocks(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t output,
                     const Activations& target, Action action) {
    Block<G, Pairs> block(layer, x, target, action);
    const int64_t end = least(output + kLinearOutputs, layer.outputs);
    for (int64_t at = output; at < end; at += kColumns * kLanes)
        for (int row = 0; row < rows; row += kRowBlock)
            block.run(first_row + row, int(least(kRowBlock, rows - row)), at);
}

// The same on matrix units.
[[maybe_unused]] void multiply_matrix(const Linear& layer, const Activations& x, int64_t first_row, int rows,
                                      int64_t output, const Activations& target, Action action) {
    MatrixMode mode;
    const uint32_t* panels[kLinearOutputs / kPanel];
    for (int n = 0; n < kLinearOutputs / kPanel; ++n)
        panels[n] = layer.weight + (output / kPanel + n) * (layer.inputs / 2 * kPanel);
    alignas(64) float sums[kMatrix][kLinearOutputs];
    for (int64_t row = first_row; row < first_row + rows; row += kMatrix) {
        const int count = int(least(kMatrix, first_row + rows - row));
        mode.use_rows(count);
        matrix_scores(static_cast<const uint16_t*>(x.data) + row * x.stride, x.stride, panels, nullptr,
                      int(layer.inputs), sums[0], kLinearOutputs);
        for (int i = 0; i < count; ++i)
            for (int n = 0; n < kLinearOutputs; n += kLanes)
                finish(layer, target, action, row + i, output + n, load(&sums[i][n]));
    }
}

// The same with int8 weights, which are made bfloat16 piece by piece.
[[maybe_unused]] void multiply_matrix_bytes(const Linear& layer, const Activations& x, int64_t first_row, int rows,
                                            int64_t output, const Activations& target, Action action) {
    constexpr int kPanels = kLinearOutputs / kPanel;
    MatrixMode mode;
    const uint32_t* column[kPanels];
    alignas(64) uint32_t converted[kPanels][kMatrixInputs / 2 * kPanel];
    const uint32_t* panels[kPanels];
    for (int n = 0; n < kPanels; ++n) {
        column[n] = layer.weight + (output / kPanel + n) * (layer.inputs / 4 * kPanel);
        panels[n] = converted[n];
    }
    alignas(64) float sums[kLinearRows][kLinearOutputs];
    for (int64_t input = 0; input < layer.inputs; input += kMatrixInputs) {
        const int inputs = int(least(kMatrixInputs, layer.inputs - input));
        for (int n = 0; n < kPanels; ++n)
            convert<4, 2>(column[n] + input / 4 * kPanel, inputs / 4, converted[n]);
        for (int row = 0; row < rows; row += kMatrix) {
            mode.use_rows(int(least(kMatrix, rows - row)));
            const auto* own = static_cast<const uint16_t*>(x.data) + (first_row + row) * x.stride + input;
            if (input) matrix_scores<true>(own, x.stride, panels, nullptr, inputs, sums[row], kLinearOutputs);
            else matrix_scores(own, x.stride, panels, nullptr, inputs, sums[row], kLinearOutputs);
        }
    }
    for (int row = 0; row < rows; ++row)
        for (int n = 0; n < kLinearOutputs; n += kLanes)
            finish(layer, target, action, first_row + row, output + n, load(&sums[row][n]));
}

}  // namespace

void multiply_linear(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t output,
                     const Activations& target, Action action) {
    const bool bytes = layer.storage == kInt8;
    if constexpr (kHasMatrix)
        if (x.type == kBfloat16 && layer.inputs % kHalf == 0)
            return (bytes ? multiply_matrix_bytes : multiply_matrix)(layer, x, first_row, rows, output, target, action);
    if constexpr (kHasBfloat16)
        if (x.type == kBfloat16)
            return (bytes ? multiply_blocks<4, true> : multiply_blocks<2, true>)(layer, x, first_row, rows, output,
                                                                                 target, action);
    const auto multiply = bytes                        ? multiply_blocks<4, false>
                          : layer.storage == kBfloat16 ? multiply_blocks<2, false>
                                                       : multiply_blocks<1, false>;
    multiply(layer, x, first_row, rows, output, target, action);
}

void normalise(const Norm& norm, const float* x, int64_t hidden, float epsilon, int64_t first_row, int64_t rows,
               const Activations& target) {
    for (int64_t row = first_row; row < first_row + rows; ++row) {
        const float* in = x + row * hidden;
        Floats sum = splat(0.0f), squares = splat(0.0f);
        for (int64_t i = 0; i < hidden; i += kLanes) sum = sum + load_some(in + i, int(least(kLanes, hidden - i)));
        const Floats mean = splat(sum_lanes(sum) / float(hidden));
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = int(least(kLanes, hidden - i));
            const Floats centred = keep(load_some(in + i, count) - mean, 0, count, splat(0.0f));
            squares = fma(centred, centred, squares);
        }
        const Floats scale = splat(1.0f / std::sqrt(sum_lanes(squares) / float(hidden) + epsilon));
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = int(least(kLanes, hidden - i));
            const Floats centred = (load_some(in + i, count) - mean) * scale;
            store_row(target, row, i,
                      fma(centred, load_some(norm.weight + i, count), load_some(norm.bias + i, count)), count);
        }
    }
}

}  // namespace dape::DAPE_ISA
