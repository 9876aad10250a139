// The score network of training in one instruction set.
#pragma once

#include "walk.h"

namespace dape::DAPE_ISA {

// See `Kernel`.
int64_t adapter_bytes(const Adapter& adapter);
void adapt(const Adapter& adapter, int64_t tile, void* adapted, void* scratch);
void adapt_backward(const Adapter& adapter, int64_t part, const AdapterGradients& gradients, void* scratch);

}  // namespace dape::DAPE_ISA
