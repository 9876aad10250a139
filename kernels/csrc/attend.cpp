// Attention of one item: tiles of keys with all heads, the score network and the online softmax inside.
// Compiled once per instruction set.

#include <cmath>

#include "linear.h"
#include "network.h"

namespace dape::DAPE_ISA {

// Weight of a masked key: far below any score, and no infinity, whose differences are no numbers.
constexpr float kMasked = -1e30f;

// Processors take 100 times longer for subnormal numbers, and those here change no result.
class FlushSubnormals {
#if defined(__x86_64__)
  public:
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#endif
};

struct Nothing {};

// G: lanes of a cache word; Pairs: whether products with the cache and in the network are bfloat16.
template <int G, bool Pairs>
class Walk {
    using Weight = std::conditional_t<Pairs, uint16_t, float>;

  public:
    Walk(const Attention& attention, int rows, void* scratch)
        : a_(attention), e_(attention.encoding), heads_(attention.cache.heads), dim_(attention.cache.head_dim),
          padded_dim_((dim_ + kPanel - 1) / kPanel * kPanel), rows_(rows), on_matrix_(Pairs && kHasMatrix && rows >= kMatrix / 2 && dim_ % kHalf == 0),
          room_(on_matrix_ ? (rows + kMatrix - 1) / kMatrix * kMatrix : rows), arena_(scratch),
          network_(e_, heads_, arena_), positional_(e_.positional, rows, arena_) {
        const bool own_weights = Pairs || network_.convolves();
        score_stride_ = int64_t(network_.score_stride()) * network_.inputs() + 16;
        weight_stride_ = own_weights ? heads_ * kTile + 32 : score_stride_;
        query_ = arena_.take<Weight>(heads_ * room_ * dim_);
        scores_ = arena_.take<float>(room_ * score_stride_);
        adapted_ = network_.convolves() ? arena_.take<float>(heads_ * kTile) : nullptr;
        weights_ = own_weights ? arena_.take<Weight>(room_ * weight_stride_) : reinterpret_cast<Weight*>(scores_);
        output_ = arena_.take<float>(heads_ * room_ * padded_dim_);
        last_values_ = on_matrix_ ? arena_.take<uint32_t>(kPanel / 2 * padded_dim_) : nullptr;
        fade_ = arena_.take<float>(heads_ * rows);
        top_ = arena_.take<float>(heads_ * rows);
        total_ = arena_.take<float>(heads_ * rows * kLanes);
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run(const Item& item) {
        item_ = &item;
        [[maybe_unused]] const std::conditional_t<Pairs, MatrixMode, Nothing> mode;
        network_.load_weights();
        load_queries();
        clear();
        const int lag = network_.convolves() ? kPanel : 0;
        // A convolution needs the scores left of its first column.
        int64_t first = item.first_key - (lag && item.first_key ? kTile : 0);
        for (; first - lag < item.last_key; first += kTile) {
            compute_scores(first);
            positional_.begin(item.position, first);
            const bool emits = first >= item.first_key;
            const int lower = emits && first - lag < item.first_key ? lag : 0;
            for (int row = 0; row < rows_; ++row) {
                const int64_t behind = item.position + row + 1;  // one behind the row's last visible key
                float* scores = scores_ + row * score_stride_;
                const int seen = clip(behind - first, 0, kTile);
                if (Pairs && !network_.paired()) scale_scores(scores, seen);
                if (network_.convolves()) {
                    network_.set_inputs(scores, positional_, row, first, seen);
                    if (!emits) continue;
                }
                const int visible = clip(least(behind, item.last_key) - (first - lag), 0, kTile);
                if (visible <= lower) {
                    hide(row);
                    continue;
                }
                float* adapted = adapted_ ? adapted_ : scores;
                network_.adapt(scores, positional_, row, first, visible, adapted);
                soften(row, first - lag, lower, visible, adapted);
            }
            if (emits) add_values(first - lag, lower);
        }
        finish();
    }

  private:
    // Words of one head in a panel.
    int64_t key_words() const { return int64_t(dim_) / G * kPanel; }
    int64_t value_words() const { return int64_t(kPanel) / G * padded_dim_; }

    int64_t panel_of(int64_t position) const {
        const int64_t panel = position / kPanel, per_block = a_.panels_per_block;
        return a_.block_tables[item_->sequence * a_.table_stride + panel / per_block] * per_block + panel % per_block;
    }

    // The first row of the first group of rows of which one sees the key at `first` or later ones.
    int first_seeing(int64_t first) const {
        const int group = on_matrix_ ? kMatrix : kRows;
        return clip(first - item_->position, 0, rows_ - 1) / group * group;
    }

    void load_queries() {
        const float scale = Pairs ? 1.0f : e_.query_scale;
        for (int row = 0; row < rows_; ++row)
            for (int head = 0; head < heads_; ++head) {
                const int64_t at = (item_->first_row + row) * a_.query_row_stride + head * a_.query_head_stride;
                Weight* target = query_ + (head * room_ + row) * dim_;
                const auto* wide = static_cast<const float*>(a_.query) + at;
                const auto* narrow = static_cast<const uint16_t*>(a_.query) + at;
                for (int i = 0; i < dim_; ++i) {
                    if constexpr (Pairs) target[i] = narrow[i];
                    else target[i] = scale * (a_.query_type == kBfloat16 ? widen(narrow[i]) : wide[i]);
                }
            }
    }

    void clear() {
        __builtin_memset(output_, 0, sizeof(float) * heads_ * room_ * padded_dim_);
        __builtin_memset(total_, 0, sizeof(float) * heads_ * rows_ * kLanes);
        // Columns that no tile writes, and those left of the first key.
        __builtin_memset(scores_, 0, sizeof(float) * rows_ * score_stride_);
        for (int i = 0; i < heads_ * rows_; ++i) top_[i] = kMasked;
    }

    // Scores of the keys from `first`, as far as the item's rows can see any.
    void compute_scores(int64_t first) {
        if (network_.convolves()) network_.carry(scores_, score_stride_, rows_);
        const int64_t end = item_->position + rows_;
        const int columns = clip(end - first, 0, kTile), first_row = first_seeing(first);
        if (columns == 0) return;
        const bool more = first + kTile < item_->last_key;
        const uint32_t* panels[2 * kTile / kPanel];
        const float* scales[kTile / kPanel];
        for (int p = 0; p * kPanel < columns; ++p) {
            const int64_t panel = panel_of(first + p * kPanel);
            panels[p] = a_.cache.key + panel * heads_ * key_words();
            if constexpr (G == 4) scales[p] = a_.cache.key_scale + panel * heads_ * kPanel;
            const int64_t next = more ? least(first + kTile + p * kPanel, item_->last_key - 1) : first + p * kPanel;
            panels[p + kTile / kPanel] = a_.cache.key + panel_of(next) * heads_ * key_words();
        }
        float* out = scores_ + (network_.convolves() ? kCarry : 0);
        if constexpr (Pairs && kHasMatrix)
            if (on_matrix_) return compute_on_matrix(panels, columns, first_row, out);
        const int last = (columns - 1) / kPanel;
        for (int head = 0; head < heads_; ++head)
            for (int column = 0; column < columns; column += kColumns * kLanes) {
                const uint32_t *keys[kColumns], *next[kColumns];
                const float* scale[kColumns] = {};
                for (int n = 0; n < kColumns; ++n) {
                    // Panels that no row sees are read as the last one.
                    const int at = column + n * kLanes, p = int(least(at / kPanel, last)), lane = at % kPanel;
                    keys[n] = panels[p] + head * key_words() + lane;
                    next[n] = head + 1 < heads_ ? keys[n] + key_words() : panels[p + kTile / kPanel] + lane;
                    if constexpr (G == 4) scale[n] = scales[p] + head * kPanel + lane;
                }
                for (int row = first_row; row < rows_;)
                    row += with_largest(Rows{}, rows_ - row, [&](auto m) {
                        score_tile<G, Pairs, m, kColumns>(
                            query_ + (head * room_ + row) * dim_, dim_, keys, row > first_row ? nullptr : next,
                            dim_ / G, scale, out + row * score_stride_ + head * network_.score_stride() + column,
                            score_stride_);
                    });
            }
    }

    void compute_on_matrix(const uint32_t* const* panels, int columns, int first_row, float* out) {
        const int last = (columns - 1) / kPanel;
        for (int head = 0; head < heads_; ++head) {
            const uint32_t* keys[kTile / kPanel];
            // Panels that no row sees are read as the last one.
            for (int p = 0; p < kTile / kPanel; ++p) keys[p] = panels[least(p, last)] + head * key_words();
            for (int row = first_row; row < rows_; row += kMatrix)
                matrix_scores(query_ + (head * room_ + row) * dim_, dim_, keys, dim_,
                              out + row * score_stride_ + head * network_.score_stride(), score_stride_);
        }
    }

    // Queries of bfloat16 are multiplied as they are. The network has the scale in its weights, otherwise:
    void scale_scores(float* scores, int visible) {
        const int lead = network_.convolves() ? kCarry : 0;
        for (int head = 0; head < heads_; ++head)
            for (int i = 0; i < visible; i += kLanes) {
                float* score = scores + head * network_.score_stride() + lead + i;
                store(score, load(score) * splat(e_.query_scale));
            }
    }

    void hide(int row) {
        __builtin_memset(weights_ + row * weight_stride_, 0, sizeof(Weight) * heads_ * kTile);
        for (int head = 0; head < heads_; ++head) fade_[head * rows_ + row] = 1.0f;
    }

    // Turn a row's scores of the keys from `first` into weights, of which columns `lower` to `visible` count.
    void soften(int row, int64_t first, int lower, int visible, const float* scores) {
        const float* value_scales[kTile / kPanel];
        if constexpr (G == 4)
            for (int p = lower / kPanel; p * kPanel < visible; ++p)
                value_scales[p] = a_.cache.value_scale + panel_of(first + p * kPanel) * heads_ * kPanel;
        constexpr int kVectors = kTile / kLanes;
        const bool partial = lower > 0 || visible < kTile;
        for (int head = 0; head < heads_; ++head) {
            Floats x[kVectors];
            Floats highest = splat(kMasked);
            unrolled<kVectors>([&](auto n) DAPE_INLINE_LAMBDA {
                x[n] = load(scores + head * kTile + n * kLanes);
                if (partial)
                    x[n] = keep(x[n], clip(lower - n * kLanes, 0, kLanes), clip(visible - n * kLanes, 0, kLanes),
                                splat(kMasked));
                highest = max(highest, x[n]);
            });
            float& top = top_[row * heads_ + head];
            float* total = total_ + (row * heads_ + head) * kLanes;
            float fade = 1.0f;
            if (any_above(highest, splat(top))) {
                const float higher = max_lane(highest);
                float lanes[kLanes];
                store(lanes, exp2(splat(top - higher)));
                fade = lanes[0];
                top = higher;
            }
            fade_[head * rows_ + row] = fade;
            Floats sum = load(total) * splat(fade);
            Weight* weights = weights_ + row * weight_stride_ + head * kTile;
            const Floats reference = splat(top);
            unrolled<kVectors>([&](auto n) DAPE_INLINE_LAMBDA {
                Floats y = exp2(x[n] - reference);
                sum = sum + y;
                if constexpr (G == 4)
                    if (n * kLanes < visible && n * kLanes >= lower)
                        y = y * load(value_scales[n * kLanes / kPanel] + head * kPanel + n * kLanes % kPanel);
                store_weights(weights + n * kLanes, y);
            });
            store(total, sum);
        }
    }

    static void store_weights(Weight* target, Floats y) {
        if constexpr (!Pairs) store(target, y);
#if defined(__AVX512BF16__)
        else _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(y));
#endif
    }

    // Fade the outputs and add the weighted values of the keys from `first`, columns from `lower`.
    void add_values(int64_t first, int lower) {
        const int count = int(least(kTile, least(item_->last_key, item_->position + rows_) - first)) - lower;
        if (count <= 0) return;
        const int first_row = first_seeing(first + lower);
        const uint32_t* panels[kTile / kPanel];
        for (int p = 0; p * kPanel < count; ++p)
            panels[p] = a_.cache.value + panel_of(first + lower + p * kPanel) * heads_ * value_words();
        if constexpr (Pairs && kHasMatrix)
            if (on_matrix_) return add_on_matrix(panels, count, first_row, lower);
        for (int head = 0; head < heads_; ++head)
            for (int element = 0; element < padded_dim_;) {
                const uint32_t *values[kTile / kPanel], *next[kTile / kPanel];
                for (int p = 0; p * kPanel < count; ++p) {
                    values[p] = panels[p] + head * value_words() + element;
                    next[p] = values[p] + value_words();
                }
                const bool ahead = head + 1 < heads_;
                element += kLanes * with_largest(Columns{}, (padded_dim_ - element) / kLanes, [&](auto n) {
                    for (int row = first_row; row < rows_;)
                        row += with_largest(Rows{}, rows_ - row, [&](auto m) {
                            output_tile<G, Pairs, m, n>(weights_ + row * weight_stride_ + head * kTile + lower,
                                                        weight_stride_, values,
                                                        ahead && row == first_row ? next : nullptr, padded_dim_, count,
                                                        fade_ + head * rows_ + row,
                                                        output_ + (head * room_ + row) * padded_dim_ + element,
                                                        padded_dim_);
                        });
                });
            }
    }

    void add_on_matrix(const uint32_t* const* panels, int count, int first_row, int lower) {
        const int all = (count + kPanel - 1) / kPanel, partial = count % kPanel;
        for (int head = 0; head < heads_; ++head) {
            const uint32_t* values[kTile / kPanel];
            for (int p = 0; p < all; ++p) values[p] = panels[p] + head * value_words();
            if (partial) values[all - 1] = present_values(values[all - 1], partial);
            for (int row = first_row; row < rows_; row += kMatrix) {
                float* output = output_ + (head * room_ + row) * padded_dim_;
                fade_outputs(output, fade_ + head * rows_ + row, int(least(kMatrix, rows_ - row)));
                const uint16_t* weights = weights_ + row * weight_stride_ + head * kTile + lower;
                for (int element = 0; element < padded_dim_;) {
                    const uint32_t* own[kTile / kPanel];
                    for (int p = 0; p < all; ++p) own[p] = values[p] + element;
                    const bool four = element + 4 * kMatrix <= padded_dim_;
                    (four ? matrix_outputs<4> : matrix_outputs<1>)(weights, weight_stride_, own, padded_dim_, all,
                                                                   output + element, padded_dim_);
                    element += four ? 4 * kMatrix : kMatrix;
                }
            }
        }
    }

    // A copy of the first `count` values of a panel with zeros behind: what lies there may be no number.
    const uint32_t* present_values(const uint32_t* panel, int count) {
        for (int pair = 0; pair < kPanel / 2; ++pair) {
            const uint32_t mask = 2 * pair + 1 < count ? ~0u : 2 * pair < count ? 0xffffu : 0;
            for (int i = 0; i < padded_dim_; ++i) last_values_[pair * padded_dim_ + i] = panel[pair * padded_dim_ + i] & mask;
        }
        return last_values_;
    }

    void fade_outputs(float* output, const float* fade, int rows) {
        for (int row = 0; row < rows; ++row)
            if (fade[row] != 1.0f)
                for (int i = 0; i < padded_dim_; i += kLanes) {
                    float* values = output + row * padded_dim_ + i;
                    store(values, load(values) * splat(fade[row]));
                }
    }

    void finish() {
        for (int row = 0; row < rows_; ++row)
            for (int head = 0; head < heads_; ++head) {
                const float mass = sum_lanes(load(total_ + (row * heads_ + head) * kLanes));
                const float logarithm = mass == 0 ? -INFINITY : top_[row * heads_ + head] + std::log2(mass);
                const float share = mass == 0 ? 0.0f : 1.0f / mass;
                const float* output = output_ + (head * room_ + row) * padded_dim_;
                const int64_t at = (item_->first_row + row) * heads_ + head;
                if (item_->part) {
                    float* part = item_->part + (row * heads_ + head) * (dim_ + 1);
                    for (int i = 0; i < dim_; ++i) part[i] = output[i] * share;
                    part[dim_] = logarithm;
                    continue;
                }
                a_.lse[at] = logarithm * float(M_LN2);
                if (a_.query_type == kBfloat16) {
                    auto* target = static_cast<uint16_t*>(a_.output) + at * dim_;
                    for (int i = 0; i < dim_; ++i) target[i] = narrow(output[i] * share);
                } else {
                    auto* target = static_cast<float*>(a_.output) + at * dim_;
                    for (int i = 0; i < dim_; ++i) target[i] = output[i] * share;
                }
            }
    }

    const Attention& a_;
    const Encoding& e_;
    const int heads_, dim_, padded_dim_, rows_;
    const bool on_matrix_;
    const int room_;  // rows that there is memory for: whole matrix tiles
    const Item* item_ = nullptr;
    Arena arena_;
    Network<Pairs> network_;
    PositionalRows positional_;
    int64_t score_stride_, weight_stride_;
    Weight* query_;    // [H, rows, d]
    float* scores_;    // [rows, score_stride_]
    float* adapted_;   // [H, kTile] of one row, where convolutions keep the scores for the next tile
    Weight* weights_;  // [rows, weight_stride_]
    float* output_;    // [H, rows, padded d], to be divided by the sum of weights
    uint32_t* last_values_;  // one head's panel
    float* fade_;      // [H, rows]: what the tile's new maximum leaves of earlier outputs
    float* top_;       // [rows, H]: largest score so far
    float* total_;     // [rows, H, kLanes]: sum of weights, by lane
};

template <class Action>
inline void with_walk(const Attention& attention, int rows, void* scratch, Action&& action) {
    if (attention.cache.storage == kInt8) {
        Walk<4, false> walk(attention, rows, scratch);
        action(walk);
    } else if (attention.cache.storage == kBfloat16) {
        if constexpr (kHasBfloat16)
            if (attention.query_type == kBfloat16) {
                Walk<2, true> walk(attention, rows, scratch);
                return action(walk);
            }
        Walk<2, false> walk(attention, rows, scratch);
        action(walk);
    } else {
        Walk<1, false> walk(attention, rows, scratch);
        action(walk);
    }
}

static int64_t scratch_bytes(const Attention& attention) {
    int64_t bytes = 0;
    with_walk(attention, rows_per_item(attention.cache.heads), nullptr,
              [&](auto& walk) { bytes = walk.scratch_bytes(); });
    return bytes;
}

static void walk(const Attention& attention, const Item& item, void* scratch) {
    [[maybe_unused]] const FlushSubnormals flush;
    with_walk(attention, item.rows, scratch, [&](auto& walk) { walk.run(item); });
}

}  // namespace dape::DAPE_ISA

#define DAPE_TEXT_(x) #x
#define DAPE_TEXT(x) DAPE_TEXT_(x)
#define DAPE_JOIN_(a, b) a##b
#define DAPE_JOIN(a, b) DAPE_JOIN_(a, b)

namespace dape {
extern const Kernel DAPE_JOIN(kernel_, DAPE_ISA);
const Kernel DAPE_JOIN(kernel_, DAPE_ISA) = {DAPE_TEXT(DAPE_ISA), DAPE_ISA::kHasBfloat16,   DAPE_ISA::scratch_bytes,
                                             DAPE_ISA::walk,      DAPE_ISA::multiply_linear, DAPE_ISA::normalise};
}  // namespace dape
