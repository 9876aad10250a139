#include "cache.h"

#include <cmath>
#include <type_traits>

#include "bfloat16.h"

namespace dape {

namespace {

// Where the elements of one head of one slot lie, in units of the stored type, with G of them in a word.
template <int G>
struct Place {
    int64_t key, value;  // of element 0
    int64_t value_stride() const { return G; }
    // Of an element of the key; those of the value are `value_stride` apart.
    int64_t key_at(int e) const { return key + e / G * (kPanel * G) + e % G; }
};

template <int G>
Place<G> place_of(const Cache& cache, int64_t slot, int64_t head) {
    const int64_t panel = slot / kPanel * cache.heads + head, place = slot % kPanel;
    const int64_t width = (cache.head_dim + kPanel - 1) / kPanel * kPanel;
    return {(panel * (cache.head_dim / G) * kPanel + place) * G,
            (panel * (kPanel / G) + place / G) * width * G + place % G};
}

int64_t scale_place(const Cache& cache, int64_t slot, int64_t head) {
    return (slot / kPanel * cache.heads + head) * kPanel + slot % kPanel;
}

struct Wide {
    const float* data;
    float operator[](int64_t e) const { return data[e]; }
};

struct Narrow {
    const uint16_t* data;
    float operator[](int64_t e) const { return widen(data[e]); }
};

// The scale of an int8 vector, and the factor that its elements are multiplied by. A vector that holds an infinity
// or no number makes the scale so: the result must show it.
template <class Elements>
float find_scale(Elements x, int dim, float& inverse) {
    float largest = 0;
    for (int e = 0; e < dim; ++e) {
        const float size = std::fabs(x[e]);
        largest = size > largest || size != size ? size : largest;
    }
    inverse = largest > 0 && largest < INFINITY ? 127 / largest : 0;
    return largest / 127;
}

int8_t quantise(float x) { return x == x ? int8_t(std::lrint(x)) : 0; }

template <int G, class Elements>
void write_row(const Cache& cache, int64_t slot, int64_t head, Elements key, Elements value) {
    const Place<G> place = place_of<G>(cache, slot, head);
    const int dim = cache.head_dim;
    const auto store = [&](auto* keys, auto* values, auto convert_key, auto convert_value) {
        for (int e = 0; e < dim; ++e) keys[place.key_at(e)] = convert_key(key[e]);
        for (int e = 0; e < dim; ++e) values[place.value + e * place.value_stride()] = convert_value(value[e]);
    };
    if constexpr (G == 1) {
        const auto same = [](float x) { return x; };
        store(reinterpret_cast<float*>(cache.key), reinterpret_cast<float*>(cache.value), same, same);
    } else if constexpr (G == 2) {
        store(reinterpret_cast<uint16_t*>(cache.key), reinterpret_cast<uint16_t*>(cache.value), narrow, narrow);
    } else {
        float key_inverse, value_inverse;
        const int64_t scale = scale_place(cache, slot, head);
        cache.key_scale[scale] = find_scale(key, dim, key_inverse);
        cache.value_scale[scale] = find_scale(value, dim, value_inverse);
        store(
            reinterpret_cast<int8_t*>(cache.key), reinterpret_cast<int8_t*>(cache.value),
            [&](float x) { return quantise(x * key_inverse); }, [&](float x) { return quantise(x * value_inverse); });
    }
}

template <int G>
void read_row(const Cache& cache, int64_t slot, int64_t head, float* key, float* value) {
    const Place<G> place = place_of<G>(cache, slot, head);
    const auto load = [&](const auto* keys, const auto* values, auto convert, float key_scale, float value_scale) {
        for (int e = 0; e < cache.head_dim; ++e) {
            key[e] = convert(keys[place.key_at(e)]) * key_scale;
            value[e] = convert(values[place.value + e * place.value_stride()]) * value_scale;
        }
    };
    if constexpr (G == 1) {
        load(reinterpret_cast<const float*>(cache.key), reinterpret_cast<const float*>(cache.value),
             [](float x) { return x; }, 1, 1);
    } else if constexpr (G == 2) {
        load(reinterpret_cast<const uint16_t*>(cache.key), reinterpret_cast<const uint16_t*>(cache.value), widen, 1, 1);
    } else {
        const int64_t scale = scale_place(cache, slot, head);
        load(
            reinterpret_cast<const int8_t*>(cache.key), reinterpret_cast<const int8_t*>(cache.value),
            [](int8_t x) { return float(x); }, cache.key_scale[scale], cache.value_scale[scale]);
    }
}

// Call `action` with the number of elements in a word.
template <class Action>
void with_lanes(const Cache& cache, Action action) {
    if (cache.storage == kFloat32) action(std::integral_constant<int, 1>{});
    else if (cache.storage == kBfloat16) action(std::integral_constant<int, 2>{});
    else action(std::integral_constant<int, 4>{});
}

}  // namespace

void write_slots(const Cache& cache, const Source& key, const Source& value, int32_t type, const int64_t* slots,
                 int64_t first, int64_t last) {
    with_lanes(cache, [&](auto lanes) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t head = 0; head < cache.heads; ++head) {
                const int64_t k = row * key.row_stride + head * key.head_stride;
                const int64_t v = row * value.row_stride + head * value.head_stride;
                if (type == kBfloat16)
                    write_row<lanes>(cache, slots[row], head, Narrow{static_cast<const uint16_t*>(key.data) + k},
                                     Narrow{static_cast<const uint16_t*>(value.data) + v});
                else
                    write_row<lanes>(cache, slots[row], head, Wide{static_cast<const float*>(key.data) + k},
                                     Wide{static_cast<const float*>(value.data) + v});
            }
    });
}

void read_slots(const Cache& cache, const int64_t* slots, int64_t count, float* key, float* value) {
    with_lanes(cache, [&](auto lanes) {
        for (int64_t head = 0; head < cache.heads; ++head)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = (head * count + i) * cache.head_dim;
                read_row<lanes>(cache, slots[i], head, key + at, value + at);
            }
    });
}

}  // namespace dape
