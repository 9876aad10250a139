#include "plan.h"

#include <algorithm>
#include <cmath>

#include "bfloat16.h"

namespace dape {

namespace {

// Keys that a part has at least, times rows: fewer cost more to merge than they save.
constexpr int64_t kLeastWork = 1024;
// Items per thread that keep the threads evenly busy.
constexpr int64_t kItemsPerThread = 8;

int64_t work(const Item& item) { return item.rows * (item.last_key - item.first_key); }

}  // namespace

Plan make_plan(const Attention& attention, int threads) {
    Plan plan;
    const int64_t most_rows = rows_per_item(attention.cache);
    std::vector<Item> blocks;
    int64_t total = 0;
    for (int64_t sequence = 0; sequence < attention.sequences; ++sequence) {
        const int64_t start = attention.query_starts[sequence], rows = attention.query_starts[sequence + 1] - start;
        for (int64_t row = 0; row < rows; row += most_rows) {
            Item item{};
            item.sequence = sequence;
            item.first_row = start + row;
            item.position = attention.context_lens[sequence] - rows + row;
            item.rows = int32_t(std::min(most_rows, rows - row));
            item.last_key = item.position + item.rows;
            total += work(item);
            blocks.push_back(item);
        }
    }
    const int64_t most_work = std::max(kLeastWork, total / (threads * kItemsPerThread));
    int64_t floats = 0;
    for (const Item& block : blocks) {
        const int64_t wanted = threads > 1 ? (work(block) + most_work - 1) / most_work : 1;
        const int64_t tiles = (block.last_key + kTile - 1) / kTile, count = std::min(wanted, tiles);
        if (count < 2) {
            plan.items.push_back(block);
            continue;
        }
        plan.splits.push_back({int64_t(plan.parts.size()), int32_t(count)});
        for (int64_t part = 0; part < count; ++part) {
            Item item = block;
            item.first_key = tiles * part / count * kTile;
            item.last_key = std::min(tiles * (part + 1) / count * kTile, block.last_key);
            plan.parts.push_back(item);
            floats += int64_t(item.rows) * attention.cache.heads * (attention.cache.head_dim + 1);
        }
    }
    plan.memory.resize(floats);
    float* memory = plan.memory.data();
    for (Item& item : plan.parts) {
        item.part = memory;
        memory += int64_t(item.rows) * attention.cache.heads * (attention.cache.head_dim + 1);
    }
    plan.items.insert(plan.items.end(), plan.parts.begin(), plan.parts.end());
    std::stable_sort(plan.items.begin(), plan.items.end(),
                     [](const Item& a, const Item& b) { return work(a) > work(b); });
    return plan;
}

void merge(const Attention& attention, const Plan& plan, const Plan::Split& split) {
    const Item* parts = &plan.parts[split.first_item];
    const int64_t heads = attention.cache.heads, dim = attention.cache.head_dim;
    std::vector<float> sums(dim);
    for (int64_t row = 0; row < parts->rows; ++row)
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t own = (row * heads + head) * (dim + 1), at = (parts->first_row + row) * heads + head;
            float top = parts->part[own + dim], mass = 0;
            for (int part = 1; part < split.count; ++part) top = std::max(top, parts[part].part[own + dim]);
            std::fill(sums.begin(), sums.end(), 0.0f);
            // Parts without a key have minus infinity; where all have, the result is theirs: zeros.
            const float reference = std::isinf(top) ? 0.0f : top;
            for (int part = 0; part < split.count; ++part) {
                const float* output = parts[part].part + own;
                const float weight = std::exp2(output[dim] - reference);
                mass += weight;
                for (int64_t i = 0; i < dim; ++i) sums[i] += weight * output[i];
            }
            attention.lse[at] = (reference + std::log2(mass)) * float(M_LN2);
            const float share = mass == 0 ? 0.0f : 1.0f / mass;
            for (int64_t i = 0; i < dim; ++i)
                if (attention.query_type == kBfloat16)
                    static_cast<uint16_t*>(attention.output)[at * dim + i] = narrow(sums[i] * share);
                else static_cast<float*>(attention.output)[at * dim + i] = sums[i] * share;
        }
}

}  // namespace dape
