#include "cache.h"

#include <bit>
#include <cmath>

namespace dape {

namespace {

float widen(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }

uint16_t narrow(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // stays no number
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Where the elements of one head of one slot lie, in units of the stored type: element e of a key and of a value
// is at `start` + (e / group) * `stride` + e % group, for values with a group of one.
struct Place {
    int64_t start, stride;
    int group;
};

int lanes(const Cache& cache) { return cache.storage == kFloat32 ? 1 : cache.storage == kBfloat16 ? 2 : 4; }

Place key_place(const Cache& cache, int64_t slot, int64_t head) {
    const int64_t group = lanes(cache), words = cache.head_dim / group * kPanel;
    const int64_t word = (slot / kPanel * cache.heads + head) * words + slot % kPanel;
    return {word * group, kPanel * group, int(group)};
}

Place value_place(const Cache& cache, int64_t slot, int64_t head) {
    const int64_t group = lanes(cache), width = (cache.head_dim + kPanel - 1) / kPanel * kPanel;
    const int64_t place = slot % kPanel;
    const int64_t word = ((slot / kPanel * cache.heads + head) * (kPanel / group) + place / group) * width;
    return {word * group + place % group, group, 1};
}

int64_t at(const Place& place, int e) { return place.start + e / place.group * place.stride + e % place.group; }

void write_head(const Cache& cache, const Place& place, uint32_t* words, float* scale, const void* data,
                int64_t offset, int32_t type) {
    const int dim = cache.head_dim;
    const auto element = [&](int e) {
        return type == kBfloat16 ? widen(static_cast<const uint16_t*>(data)[offset + e])
                                 : static_cast<const float*>(data)[offset + e];
    };
    if (cache.storage == kFloat32) {
        auto* target = reinterpret_cast<float*>(words);
        for (int e = 0; e < dim; ++e) target[at(place, e)] = element(e);
    } else if (cache.storage == kBfloat16) {
        auto* target = reinterpret_cast<uint16_t*>(words);
        for (int e = 0; e < dim; ++e) target[at(place, e)] = narrow(element(e));
    } else {
        auto* target = reinterpret_cast<int8_t*>(words);
        float largest = 0;
        for (int e = 0; e < dim; ++e) {
            const float size = std::fabs(element(e));
            largest = size > largest || size != size ? size : largest;
        }
        // A value that is no number, or infinite, makes the scale so: the result must show it.
        *scale = largest / 127;
        const float inverse = largest > 0 && largest < INFINITY ? 127 / largest : 0;
        for (int e = 0; e < dim; ++e) {
            const float x = element(e) * inverse;
            target[at(place, e)] = x == x ? int8_t(std::lrint(x)) : 0;
        }
    }
}

void read_head(const Cache& cache, const Place& place, const uint32_t* words, float scale, float* out) {
    for (int e = 0; e < cache.head_dim; ++e) {
        const int64_t index = at(place, e);
        if (cache.storage == kFloat32) out[e] = reinterpret_cast<const float*>(words)[index];
        else if (cache.storage == kBfloat16) out[e] = widen(reinterpret_cast<const uint16_t*>(words)[index]);
        else out[e] = reinterpret_cast<const int8_t*>(words)[index] * scale;
    }
}

int64_t scale_place(const Cache& cache, int64_t slot, int64_t head) {
    return (slot / kPanel * cache.heads + head) * kPanel + slot % kPanel;
}

}  // namespace

void write_slots(const Cache& cache, const Source& key, const Source& value, int32_t type, const int64_t* slots,
                 int64_t rows) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t head = 0; head < cache.heads; ++head) {
            const int64_t slot = slots[row], scale = scale_place(cache, slot, head);
            const bool scaled = cache.storage == kInt8;
            write_head(cache, key_place(cache, slot, head), cache.key, scaled ? cache.key_scale + scale : nullptr,
                       key.data, row * key.row_stride + head * key.head_stride, type);
            write_head(cache, value_place(cache, slot, head), cache.value,
                       scaled ? cache.value_scale + scale : nullptr, value.data,
                       row * value.row_stride + head * value.head_stride, type);
        }
}

void read_slots(const Cache& cache, const int64_t* slots, int64_t count, float* key, float* value) {
    for (int64_t head = 0; head < cache.heads; ++head)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t slot = slots[i], scale = scale_place(cache, slot, head);
            const int64_t out = (head * count + i) * cache.head_dim;
            const bool scaled = cache.storage == kInt8;
            read_head(cache, key_place(cache, slot, head), cache.key, scaled ? cache.key_scale[scale] : 1, key + out);
            read_head(cache, value_place(cache, slot, head), cache.value, scaled ? cache.value_scale[scale] : 1,
                      value + out);
        }
}

}  // namespace dape
