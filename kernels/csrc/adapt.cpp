// The score network of training, over all pairs of a block of whole sequences, in both directions. Compiled once per
// instruction set.

#include "adapt.h"

#include "network.h"

namespace dape::DAPE_ISA {

namespace {

// Columns of a register tile.
constexpr int kGroup = kColumns * kLanes;
static_assert(kAdapterPairs % kGroup == 0);

// Rows and columns of a register tile of sums over pairs.
using Square = std::integer_sequence<int, 4, 2, 1>;

// A matrix of which either its rows or its columns are adjacent.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// out[rows, pairs] = finish(weights[rows, depth] in[depth, pairs], plus `added` [rows, pairs] where there is one).
// `finish` gets a vector of sums and its place.
template <class Finish>
void multiply(Matrix weights, int rows, int depth, const float* in, const float* added, float* out, Finish&& finish) {
    for (int row = 0; row < rows;)
        row += with_largest(Rows{}, rows - row, [&](auto count) DAPE_INLINE_LAMBDA {
            for (int pair = 0; pair < kAdapterPairs; pair += kGroup) {
                Floats sum[count][kColumns];
                unrolled<count>([&](auto r) DAPE_INLINE_LAMBDA {
                    unrolled<kColumns>([&](auto c) DAPE_INLINE_LAMBDA {
                        const int at = (row + r) * kAdapterPairs + pair + c * kLanes;
                        sum[r][c] = added ? load(added + at) : splat(0.0f);
                    });
                });
                for (int k = 0; k < depth; ++k) {
                    const float* weight = weights.data + row * weights.row + k * weights.column;
                    Floats x[kColumns];
                    unrolled<kColumns>([&](auto c) DAPE_INLINE_LAMBDA {
                        x[c] = load(in + k * kAdapterPairs + pair + c * kLanes);
                    });
                    unrolled<count>([&](auto r) DAPE_INLINE_LAMBDA {
                        const Floats w = splat(weight[r * weights.row]);
                        unrolled<kColumns>([&](auto c) DAPE_INLINE_LAMBDA { sum[r][c] = fma(w, x[c], sum[r][c]); });
                    });
                }
                unrolled<count>([&](auto r) DAPE_INLINE_LAMBDA {
                    unrolled<kColumns>([&](auto c) DAPE_INLINE_LAMBDA {
                        const int at = (row + r) * kAdapterPairs + pair + c * kLanes;
                        store(out + at, finish(sum[r][c], at));
                    });
                });
            }
        });
}

inline Floats unchanged(Floats x, int) { return x; }

// sums[R, C, lanes] += left[R, pairs] right[C, pairs]^T, lane by lane; rows of sums lie `stride` elements apart.
template <int R, int C>
void add_block(const float* left, const float* right, float* sums, int64_t stride) {
    Floats sum[R][C];
    unrolled<R>([&](auto r) DAPE_INLINE_LAMBDA {
        unrolled<C>([&](auto c) DAPE_INLINE_LAMBDA { sum[r][c] = load(sums + (r * stride + c) * kLanes); });
    });
    for (int pair = 0; pair < kAdapterPairs; pair += kLanes) {
        Floats x[C];
        unrolled<C>([&](auto c) DAPE_INLINE_LAMBDA { x[c] = load(right + c * kAdapterPairs + pair); });
        unrolled<R>([&](auto r) DAPE_INLINE_LAMBDA {
            const Floats w = load(left + r * kAdapterPairs + pair);
            unrolled<C>([&](auto c) DAPE_INLINE_LAMBDA { sum[r][c] = fma(w, x[c], sum[r][c]); });
        });
    }
    unrolled<R>([&](auto r) DAPE_INLINE_LAMBDA {
        unrolled<C>([&](auto c) DAPE_INLINE_LAMBDA { store(sums + (r * stride + c) * kLanes, sum[r][c]); });
    });
}

// sums[rows, columns, lanes] += left[rows, pairs] right[columns, pairs]^T, lane by lane.
void add_products(const float* left, int rows, const float* right, int columns, float* sums) {
    for (int row = 0; row < rows;)
        row += with_largest(Square{}, rows - row, [&](auto r) {
            for (int column = 0; column < columns;)
                column += with_largest(Square{}, columns - column, [&](auto c) {
                    add_block<decltype(r)::value, decltype(c)::value>(
                        left + row * kAdapterPairs, right + column * kAdapterPairs,
                        sums + (int64_t(row) * columns + column) * kLanes, columns);
                });
        });
}

// totals[i] = the sum of the lanes of sums[i].
void finish(const float* sums, int64_t count, float* totals) {
    for (int64_t i = 0; i < count; ++i) totals[i] = sum_lanes(load(sums + i * kLanes));
}

// Read rows of pairs from a tensor whose rows lie `stride` elements apart; zeros behind the last pair of a row.
void read_rows(const void* tensor, int32_t type, int64_t first, int64_t stride, int rows, int pairs, float* out) {
    for (int row = 0; row < rows; ++row, out += kAdapterPairs) {
        const int64_t at = first + row * stride;
        if (type == kBfloat16) {
            const uint16_t* from = static_cast<const uint16_t*>(tensor) + at;
            for (int pair = 0; pair < pairs; ++pair) out[pair] = widen(from[pair]);
        } else {
            __builtin_memcpy(out, static_cast<const float*>(tensor) + at, pairs * sizeof *out);
        }
        for (int pair = pairs; pair < kAdapterPairs; ++pair) out[pair] = 0.0f;
    }
}

void write_rows(void* tensor, int32_t type, int64_t first, int64_t stride, int rows, int pairs, const float* in) {
    for (int row = 0; row < rows; ++row, in += kAdapterPairs) {
        const int64_t at = first + row * stride;
        if (type == kBfloat16) {
            uint16_t* to = static_cast<uint16_t*>(tensor) + at;
            for (int pair = 0; pair < pairs; ++pair) to[pair] = narrow(in[pair]);
        } else {
            __builtin_memcpy(static_cast<float*>(tensor) + at, in, pairs * sizeof *in);
        }
    }
}

// One tile of pairs at a time: its place in the tensors, and what both directions compute.
class Tile {
  public:
    Tile(const Adapter& adapter, Arena& arena)
        : a_(adapter), scores_(arena.take<float>(a_.heads * kAdapterPairs)),
          hidden_(arena.take<float>(a_.width * kAdapterPairs)),
          activated_(arena.take<float>(a_.width * kAdapterPairs)) {}

    void move(int64_t tile) {
        first_ = tile * kAdapterPairs;
        pairs_ = int(least(kAdapterPairs, a_.pairs - first_));
        read_rows(a_.hidden, a_.type, first_, a_.pairs, a_.width, pairs_, hidden_);
    }

    void read_heads(const void* tensor, int64_t sequence, float* out) const {
        read_rows(tensor, a_.type, sequence * a_.pairs + first_, a_.sequences * a_.pairs, a_.heads, pairs_, out);
    }

    void write_heads(void* tensor, int64_t sequence, const float* in) const {
        write_rows(tensor, a_.type, sequence * a_.pairs + first_, a_.sequences * a_.pairs, a_.heads, pairs_, in);
    }

    // Compute the activated hidden values of a sequence.
    void activate(int64_t sequence) {
        read_heads(a_.scores, sequence, scores_);
        multiply({a_.first, a_.heads, 1}, a_.width, a_.heads, scores_, hidden_, activated_,
                 [](Floats x, int) { return leaky(x); });
    }

    int64_t first() const { return first_; }
    int pairs() const { return pairs_; }
    const float* scores() const { return scores_; }
    const float* activated() const { return activated_; }

  private:
    const Adapter& a_;
    float *scores_, *hidden_, *activated_;
    int64_t first_ = 0;
    int pairs_ = 0;
};

}  // namespace

int64_t adapter_bytes(const Adapter& a) {
    Arena arena(nullptr);
    Tile(a, arena);
    arena.take<float>(2 * (a.heads + a.width) * kAdapterPairs);
    arena.take<float>(2 * a.heads * a.width * kLanes);
    return arena.used();
}

void adapt(const Adapter& a, int64_t number, void* adapted, void* memory) {
    Arena arena(memory);
    Tile tile(a, arena);
    float* result = arena.take<float>(a.heads * kAdapterPairs);
    tile.move(number);
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
        tile.activate(sequence);
        multiply({a.second, a.width, 1}, a.heads, a.width, tile.activated(), a.keeps_scores ? tile.scores() : nullptr,
                 result, unchanged);
        tile.write_heads(adapted, sequence, result);
    }
}

void adapt_backward(const Adapter& a, int64_t part, const AdapterGradients& gradients, void* memory) {
    Arena arena(memory);
    Tile tile(a, arena);
    float* of_adapted = arena.take<float>(a.heads * kAdapterPairs);
    float* of_scores = arena.take<float>(a.heads * kAdapterPairs);
    float* of_hidden = arena.take<float>(a.width * kAdapterPairs);
    float* of_all_hidden = arena.take<float>(a.width * kAdapterPairs);
    const int64_t weights = int64_t(a.heads) * a.width;
    float* of_first = arena.take<float>(weights * kLanes);
    float* of_second = arena.take<float>(weights * kLanes);
    __builtin_memset(of_first, 0, weights * kLanes * sizeof *of_first);
    __builtin_memset(of_second, 0, weights * kLanes * sizeof *of_second);
    const int64_t tiles = (a.pairs + kAdapterPairs - 1) / kAdapterPairs;
    for (int64_t number = part; number < tiles; number += gradients.parts) {
        tile.move(number);
        __builtin_memset(of_all_hidden, 0, a.width * kAdapterPairs * sizeof *of_all_hidden);
        for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
            tile.activate(sequence);
            tile.read_heads(gradients.adapted, sequence, of_adapted);
            multiply({a.second, 1, a.width}, a.width, a.heads, of_adapted, nullptr, of_hidden, [&](Floats change, int at) {
                // The sign of the activated value is that of its input.
                const Floats found =
                    where_above(load(tile.activated() + at), splat(0.0f), change, change * splat(kLeakySlope));
                store(of_all_hidden + at, load(of_all_hidden + at) + found);
                return found;
            });
            multiply({a.first, 1, a.heads}, a.heads, a.width, of_hidden, a.keeps_scores ? of_adapted : nullptr, of_scores,
                     unchanged);
            tile.write_heads(gradients.scores, sequence, of_scores);
            add_products(of_hidden, a.width, tile.scores(), a.heads, of_first);
            add_products(of_adapted, a.heads, tile.activated(), a.width, of_second);
        }
        write_rows(gradients.hidden, kFloat32, tile.first(), a.pairs, a.width, tile.pairs(), of_all_hidden);
    }
    finish(of_first, weights, gradients.first + part * weights);
    finish(of_second, weights, gradients.second + part * weights);
}

}  // namespace dape::DAPE_ISA
