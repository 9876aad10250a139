// How the rows of a batch are cut into items, and how items over parts of the keys are put together.
#pragma once

#include <vector>

#include "walk.h"

namespace dape {

struct Plan {
    std::vector<Item> items;  // the longest first
    struct Split {
        int64_t first_item;  // in order of keys, among `parts`
        int32_t count;
    };
    std::vector<Split> splits;
    std::vector<Item> parts;    // items of all splits, as they are in `items`
    std::vector<float> memory;  // where they leave their results
};

// Cut the rows so that `threads` threads have evenly to do. Throws std::bad_alloc.
Plan make_plan(const Attention& attention, int threads);

// Write the output of the rows of one split.
void merge(const Attention& attention, const Plan& plan, const Plan::Split& split);

}  // namespace dape
