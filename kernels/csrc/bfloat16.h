// Conversion of single numbers. With internal linkage and without the standard library, whose functions the linker
// would share among instruction sets.
#pragma once

#include <cstdint>

namespace dape {

static inline float widen(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }

// Round to nearest even; what is no number stays none.
[[maybe_unused]] static inline uint16_t narrow(float x) {
    const auto bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace dape
