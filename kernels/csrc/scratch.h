// Small things that the parts of a walk share.
#pragma once

#include "bfloat16.h"
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

}  // namespace dape::DAPE_ISA
