// Attention, cache writes and the network of training on whole batches, shared among threads.
#pragma once

#include "cache.h"
#include "plan.h"
#include "pool.h"

namespace dape {

// Call `action` with every item below `items`, shared among `threads` threads.
template <class Action>
void share(int threads, int64_t items, Action&& action) {
    Pool::run(
        threads, items,
        [](void* context, int64_t item) { (*static_cast<std::remove_reference_t<Action>*>(context))(item); },
        const_cast<void*>(static_cast<const void*>(&action)));
}

// Compute all rows of a batch by a plan for it. Throws std::bad_alloc.
void attend(const Attention& attention, const Plan& plan);

// Store keys and values of all rows in their slots.
void write(const Cache& cache, const Source& key, const Source& value, int32_t type, const int64_t* slots,
           int64_t rows, int threads);

// See `dape_adapt` and `dape_adapt_backward`. Both throw std::bad_alloc.
void adapt(const Adapter& adapter, void* adapted);
void adapt_backward(const Adapter& adapter, const AdapterGradients& gradients);

}  // namespace dape
