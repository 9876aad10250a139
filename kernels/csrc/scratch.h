// Small things that the parts of a walk share.
#pragma once

#include "products.h"
#include "walk.h"

namespace dape::DAPE_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int clip(int64_t x, int low, int high) { return int(x < low ? low : x > high ? high : x); }

// Hands out aligned pieces of the scratch memory; with no memory it counts what would be handed out.
class Arena {
  public:
    explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // stays no number
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace dape::DAPE_ISA
