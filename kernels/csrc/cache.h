// Reading and writing single keys and values of a cache.
#pragma once

#include "abi.h"

namespace dape {

struct Source {
    const void* data;  // [T, H, d], elements of a head adjacent
    int64_t row_stride, head_stride;
};

// Store keys and values of rows `first` to `last` - 1 in their slots.
void write_slots(const Cache& cache, const Source& key, const Source& value, int32_t type, const int64_t* slots,
                 int64_t first, int64_t last);
// Copy keys and values of slots as float [H, n, d].
void read_slots(const Cache& cache, const int64_t* slots, int64_t count, float* key, float* value);

}  // namespace dape
