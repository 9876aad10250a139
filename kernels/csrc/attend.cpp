// Attention of one item: tiles of keys with all heads, the score network and the online softmax inside.
// Compiled once per instruction set.

#include <cmath>

#include "adapt.h"
#include "cached.h"
#include "linear.h"
#include "network.h"

namespace dape::DAPE_ISA {

// Weight of a masked key: far below any score, and no infinity, whose differences are no numbers.
constexpr float kMasked = -1e30f;

// The largest score may be so far above the reference, in powers of two, before that is raised: raising it costs a
// branch that nobody can predict, and floats are as exact at a size of 2^8.
constexpr float kSlack = 8.0f;

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

struct NoMatrix {
    void use_rows(int) {}
};

// G: lanes of a cache word; Pairs: whether products in the network are bfloat16, and those with the cache too, or of
// bytes if it holds bytes.
template <int G, bool Pairs>
class Walk {
    using Products = CacheProducts<G, Pairs>;
    using Weight = typename Products::Weight;
    static constexpr bool kBytes = Products::kBytes;

  public:
    Walk(const Attention& attention, int rows, void* scratch)
        : a_(attention), e_(attention.encoding), heads_(attention.cache.heads), rows_(rows), arena_(scratch),
          packed_for_(arena_.take<uint64_t>(1)), network_(e_, heads_, arena_), products_(attention, rows, arena_),
          positional_(e_.positional, rows, arena_) {
        const bool own_weights = Pairs || network_.convolves();
        const int64_t room = products_.room();
        score_stride_ = int64_t(network_.score_stride()) * network_.inputs() + 16;
        scores_ = arena_.take<float>(room * score_stride_);
        adapted_ = network_.convolves() ? arena_.take<float>(heads_ * kTile) : nullptr;
        weights_.stride = own_weights ? heads_ * kTile * Products::kPlanes + 32 : score_stride_;
        weights_.data =
            own_weights ? arena_.take<Weight>(room * weights_.stride) : reinterpret_cast<Weight*>(scores_);
        weights_.scale = kBytes ? arena_.take<float>(heads_ * rows) : nullptr;
        weights_.fade = arena_.take<float>(heads_ * rows);
        top_ = arena_.take<float>(heads_ * rows);
        total_ = arena_.take<float>(heads_ * rows * kLanes);
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run(const Item& item, uint64_t call) {
        item_ = &item;
        std::conditional_t<Pairs, MatrixMode, NoMatrix> mode;
        if (*packed_for_ != call) network_.load_weights();
        *packed_for_ = call;
        products_.begin(item);
        clear();
        const int lag = network_.convolves() ? kPanel : 0, lead = network_.convolves() ? kCarry : 0;
        // A convolution needs the scores left of its first column.
        int64_t first = item.first_key - (lag && item.first_key ? kTile : 0);
        for (; first - lag < item.last_key; first += kTile) {
            if (a_.ranks && first / a_.stripe % a_.ranks != a_.rank) continue;
            mode.use_rows(products_.matrix_rows());
            if (network_.convolves()) network_.carry(scores_, score_stride_, rows_);
            products_.compute_scores(first, scores_ + lead, score_stride_, network_.score_stride());
            if (network_.on_matrix()) mode.use_rows(kMatrix);
            positional_.begin(item.position, first);
            const bool emits = first >= item.first_key;
            const int lower = emits && first - lag < item.first_key ? lag : 0;
            for (int row = 0; row < rows_; ++row) {
                const int64_t behind = item.position + row + 1;  // one behind the row's last visible key
                float* scores = scores_ + row * score_stride_;
                const int seen = clip(behind - first, 0, kTile);
                if (Pairs && !network_.paired()) scale_scores(scores + lead, seen);
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
            mode.use_rows(products_.matrix_rows());
            if (emits) products_.add_values(first - lag, lower, weights_);
        }
        finish();
    }

  private:
    void clear() {
        __builtin_memset(total_, 0, sizeof(float) * heads_ * rows_ * kLanes);
        // Columns that no tile writes, and those left of the first key.
        __builtin_memset(scores_, 0, sizeof(float) * rows_ * score_stride_);
        for (int i = 0; i < heads_ * rows_; ++i) top_[i] = kMasked;
    }

    // Queries of bfloat16 are multiplied as they are. The network has the scale in its weights, otherwise:
    void scale_scores(float* scores, int visible) {
        for (int head = 0; head < heads_; ++head)
            for (int i = 0; i < visible; i += kLanes) {
                float* score = scores + head * network_.score_stride() + i;
                store(score, load(score) * splat(e_.query_scale));
            }
    }

    void hide(int row) {
        __builtin_memset(weights_.data + row * weights_.stride, 0, sizeof(Weight) * heads_ * kTile * Products::kPlanes);
        for (int head = 0; head < heads_; ++head) {
            weights_.fade[head * rows_ + row] = 1.0f;
            if constexpr (kBytes) weights_.scale[head * rows_ + row] = 0.0f;
        }
    }

    // Turn a row's scores of the keys from `first` into weights, of which columns `lower` to `visible` count.
    void soften(int row, int64_t first, int lower, int visible, const float* scores) {
        const float* value_scales[kTile / kPanel];
        if constexpr (G == 4)
            for (int p = lower / kPanel; p * kPanel < visible; ++p)
                value_scales[p] = products_.value_scales(first + p * kPanel);
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
            if (any_above(highest, splat(top + kSlack))) {
                const float higher = max_lane(highest);
                float lanes[kLanes];
                store(lanes, exp2(splat(top - higher)));
                fade = lanes[0];
                top = higher;
            }
            weights_.fade[head * rows_ + row] = fade;
            Floats sum = load(total) * splat(fade);
            Weight* weights = weights_.data + row * weights_.stride + head * kTile * Products::kPlanes;
            const Floats reference = splat(top);
            Floats y[kVectors];
            unrolled<kVectors>([&](auto n) DAPE_INLINE_LAMBDA {
                y[n] = exp2(x[n] - reference);
                sum = sum + y[n];
                if constexpr (G == 4)
                    if (n * kLanes < visible && n * kLanes >= lower) {
                        y[n] = y[n] * load(value_scales[n * kLanes / kPanel] + head * kPanel + n * kLanes % kPanel);
                        // The scale of a key that does not count may be no number.
                        if (partial)
                            y[n] = keep(y[n], clip(lower - n * kLanes, 0, kLanes),
                                        clip(visible - n * kLanes, 0, kLanes), splat(0.0f));
                    }
                if constexpr (!kBytes) store_weights(weights + n * kLanes, y[n]);
            });
            if constexpr (kBytes) weights_.scale[head * rows_ + row] = split_weights<kVectors>(y, weights);
            store(total, sum);
        }
    }

    template <class Target>
    static void store_weights(Target* target, Floats y) {
        if constexpr (!Pairs) store(target, y);
#if defined(__AVX512BF16__)
        else _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(y));
#endif
    }

    void finish() {
        const int dim = a_.cache.head_dim;
        for (int row = 0; row < rows_; ++row)
            for (int head = 0; head < heads_; ++head) {
                const float mass = sum_lanes(load(total_ + (row * heads_ + head) * kLanes));
                const float logarithm = mass == 0 ? -INFINITY : top_[row * heads_ + head] + std::log2(mass);
                const float share = mass == 0 ? 0.0f : 1.0f / mass;
                const float* output = products_.output(row, head);
                const int64_t at = (item_->first_row + row) * heads_ + head;
                if (item_->part) {
                    float* part = item_->part + (row * heads_ + head) * (dim + 1);
                    for (int i = 0; i < dim; ++i) part[i] = output[i] * share;
                    part[dim] = logarithm;
                    continue;
                }
                a_.lse[at] = logarithm * float(M_LN2);
                if (a_.query_type == kBfloat16) {
                    auto* target = static_cast<uint16_t*>(a_.output) + at * dim;
                    for (int i = 0; i < dim; ++i) target[i] = narrow(output[i] * share);
                } else {
                    auto* target = static_cast<float*>(a_.output) + at * dim;
                    for (int i = 0; i < dim; ++i) target[i] = output[i] * share;
                }
            }
    }

    const Attention& a_;
    const Encoding& e_;
    const int heads_, rows_;
    const Item* item_ = nullptr;
    Arena arena_;
    // First in the scratch memory, so that they lie in the same place whatever the number of rows.
    uint64_t* packed_for_;  // call that the network's weights are packed for
    Network<Pairs> network_;
    Products products_;
    PositionalRows positional_;
    int64_t score_stride_;
    float* scores_;   // [rows, score_stride_]
    float* adapted_;  // [H, kTile] of one row, where convolutions keep the scores for the next tile
    typename Products::Weights weights_;
    float* top_;    // [rows, H]: reference, at most kSlack below the largest score so far
    float* total_;  // [rows, H, kLanes]: sum of weights, by lane
};

template <class Action>
inline void with_walk(const Attention& attention, int rows, void* scratch, Action&& action) {
    if (attention.cache.storage == kInt8) {
        if constexpr (kHasBytes)
            if (attention.query_type == kBfloat16) {
                Walk<4, true> walk(attention, rows, scratch);
                return action(walk);
            }
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
    with_walk(attention, rows_per_item(attention.cache), nullptr,
              [&](auto& walk) { bytes = walk.scratch_bytes(); });
    return bytes;
}

static void walk(const Attention& attention, const Item& item, uint64_t call, void* scratch) {
    [[maybe_unused]] const FlushSubnormals flush;
    with_walk(attention, item.rows, scratch, [&](auto& walk) { walk.run(item, call); });
}

}  // namespace dape::DAPE_ISA

#define DAPE_TEXT_(x) #x
#define DAPE_TEXT(x) DAPE_TEXT_(x)
#define DAPE_JOIN_(a, b) a##b
#define DAPE_JOIN(a, b) DAPE_JOIN_(a, b)

namespace dape {
extern const Kernel DAPE_JOIN(kernel_, DAPE_ISA);
const Kernel DAPE_JOIN(kernel_, DAPE_ISA) = {DAPE_TEXT(DAPE_ISA), DAPE_ISA::kHasBfloat16,   DAPE_ISA::scratch_bytes,
                                             DAPE_ISA::walk,      DAPE_ISA::multiply_linear, DAPE_ISA::tally_linear,
                                             DAPE_ISA::normalise, DAPE_ISA::adapter_bytes,   DAPE_ISA::adapt,
                                             DAPE_ISA::adapt_backward};
}  // namespace dape
