// The functions of abi.h.

#include <new>

#include "batch.h"
#include "decoder.h"
#include "dispatch.h"

#define DAPE_EXPORT __attribute__((visibility("default")))

extern "C" {

DAPE_EXPORT const char* dape_isa() { return dape::build_name(); }

DAPE_EXPORT int32_t dape_set_isa(const char* name) { return dape::choose_isa(name) ? 0 : 1; }

DAPE_EXPORT void dape_struct_sizes(int64_t sizes[11]) {
    const int64_t own[] = {sizeof(dape::Cache), sizeof(dape::Positional), sizeof(dape::Encoding),
                           sizeof(dape::Attention), sizeof(dape::Linear), sizeof(dape::Tally),
                           sizeof(dape::Norm), sizeof(dape::Layer), sizeof(dape::Decoder),
                           sizeof(dape::Adapter), sizeof(dape::AdapterGradients)};
    for (int i = 0; i < 11; ++i) sizes[i] = own[i];
}

DAPE_EXPORT int32_t dape_attend(const dape::Attention* attention) try {
    dape::attend(*attention, dape::make_plan(*attention, attention->threads));
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

DAPE_EXPORT int32_t dape_decode(const dape::Decoder* decoder, const dape::Attention* batch, int64_t first, int64_t last,
                                float* x, float* out) try {
    dape::decode(*decoder, *batch, first, last, x, out);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

DAPE_EXPORT void dape_linear(const dape::Linear* layer, const void* x, int32_t type, int64_t stride, int64_t rows,
                             float* out, int32_t threads) {
    dape::multiply(*layer, {const_cast<void*>(x), stride, type}, rows, {out, layer->outputs, dape::kFloat32},
                   dape::kStore, threads);
}

DAPE_EXPORT void dape_tally(const dape::Linear* layer, const void* x, int32_t type, int64_t stride, int64_t rows,
                            const dape::Tally* tally, int32_t threads) {
    dape::tally(*layer, {const_cast<void*>(x), stride, type}, rows, *tally, threads);
}

DAPE_EXPORT void dape_write(const dape::Cache* cache, const void* key, const void* value, int32_t source_type,
                            int64_t key_row_stride, int64_t key_head_stride, int64_t value_row_stride,
                            int64_t value_head_stride, const int64_t* slots, int64_t rows, int32_t threads) {
    dape::write(*cache, {key, key_row_stride, key_head_stride}, {value, value_row_stride, value_head_stride},
                source_type, slots, rows, threads);
}

DAPE_EXPORT void dape_read(const dape::Cache* cache, const int64_t* slots, int64_t count, float* key, float* value) {
    dape::read_slots(*cache, slots, count, key, value);
}

DAPE_EXPORT int32_t dape_adapt(const dape::Adapter* adapter, void* adapted) try {
    dape::adapt(*adapter, adapted);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

DAPE_EXPORT int32_t dape_adapt_backward(const dape::Adapter* adapter, const dape::AdapterGradients* gradients) try {
    dape::adapt_backward(*adapter, *gradients);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
}
