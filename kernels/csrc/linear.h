// Linear layers and norms of one instruction set.
#pragma once

#include "walk.h"

namespace dape::DAPE_ISA {

// See `Kernel`.
void multiply_linear(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t output,
                     const Activations& target, Action action);
void tally_linear(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t all_rows,
                  int64_t output, int64_t end, int64_t part, const Tally& tally);
void normalise(const Norm& norm, const float* x, int64_t hidden, float epsilon, int64_t first_row, int64_t rows,
               const Activations& target);

}  // namespace dape::DAPE_ISA
