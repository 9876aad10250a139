// Log-probabilities from the results of a linear layer, while those of a few rows are in the cache. Compiled once per
// instruction set.

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "simd.h"

namespace dape::DAPE_ISA {

namespace {

constexpr float kLog2e = 1.44269504f;

// Below any output, and no infinity, whose differences are no numbers.
constexpr float kNothing = -1e30f;

// An output may be so far above the reference before that is raised: exp(20) times a vocabulary is a float, and the
// branch is seldom taken.
constexpr float kHeadroom = 20.0f;

// One row: its sums lane by lane, and its largest output, the first of those that are equal.
struct Lanes {
    Floats peak = splat(kNothing), total = splat(0.0f), above = splat(0.0f);
    float best = kNothing;
    int64_t best_id = 0;

    // Outputs `at` to `at` + kLinearOutputs - 1.
    void add(const float* scores, int64_t at, Floats mark) {
        constexpr int kVectors = kLinearOutputs / kLanes;
        Floats x[kVectors], highest = splat(kNothing);
        unrolled<kVectors>([&](auto n) DAPE_INLINE_LAMBDA {
            x[n] = load(scores + n * kLanes);
            highest = max(highest, x[n]);
        });
        // Seldom, as the later ones of many outputs are seldom above all before.
        if (any_above(highest, splat(best))) {
            best = max_lane(highest);
            best_id = at + (std::find(scores, scores + kLinearOutputs, best) - scores);
        }
        if (any_above(highest, peak + splat(kHeadroom))) {
            const Floats raised = max(peak, highest);
            total = total * exp2((peak - raised) * splat(kLog2e));
            peak = raised;
        }
        unrolled<kVectors>([&](auto n) DAPE_INLINE_LAMBDA {
            total = total + exp2((x[n] - peak) * splat(kLog2e));
            above = above + where_above(x[n], mark, splat(1.0f), splat(0.0f));
        });
    }

    // Put the lanes together.
    void finish(float& peak_out, float& total_out, float& above_out) const {
        peak_out = max_lane(peak);
        total_out = sum_lanes(total * exp2((peak - splat(peak_out)) * splat(kLog2e)));
        above_out = sum_lanes(above);
    }
};

}  // namespace

void tally_linear(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t all_rows,
                  int64_t output, int64_t end, int64_t part, const Tally& tally) {
    alignas(64) float scores[kLinearRows][kLinearOutputs];
    Lanes lanes[kLinearRows];
    // The layer stores row `first_row` where its target begins, and column `at` in the first column.
    for (int64_t at = output; at < end; at += kLinearOutputs) {
        if (at + kLinearOutputs > layer.outputs) std::fill(scores[0], scores[rows], kNothing);
        multiply_linear(layer, x, first_row, rows, at,
                        {&scores[0][0] - first_row * kLinearOutputs - at, kLinearOutputs, kFloat32}, kStore);
        for (int row = 0; row < rows; ++row) {
            lanes[row].add(scores[row], at, splat(tally.mark[first_row + row]));
            const int64_t place = tally.target[first_row + row] - at;
            if (place >= 0 && place < kLinearOutputs) tally.own[first_row + row] = scores[row][place];
        }
    }
    for (int row = 0; row < rows; ++row) {
        const int64_t to = part * all_rows + first_row + row;
        lanes[row].finish(tally.peak[to], tally.total[to], tally.above[to]);
        tally.best[to] = lanes[row].best;
        tally.best_id[to] = lanes[row].best_id;
    }
}

}  // namespace dape::DAPE_ISA
