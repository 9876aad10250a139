// A whole decoder in the GPT-NeoX form, layer after layer, on the rows of a batch.
#pragma once

#include "walk.h"

namespace dape {

// See dape_decode. Throws std::bad_alloc.
void decode(const Decoder& decoder, const Attention& batch, int64_t first, int64_t last, float* x, float* out);

// Results of a linear layer in all rows of x.
void multiply(const Linear& layer, const Activations& x, int64_t rows, const Activations& target, Action action,
              int threads);

// See dape_tally.
void tally(const Linear& layer, const Activations& x, int64_t rows, const Tally& tally, int threads);

}  // namespace dape
