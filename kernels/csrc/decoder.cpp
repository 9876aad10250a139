#include "decoder.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "batch.h"
#include "bfloat16.h"
#include "dispatch.h"

namespace dape {

namespace {

constexpr int64_t kNormRows = 16;  // of an item
// Rows that are multiplied by each int8 weight as soon as it is read. bfloat16 rows are made floats for that: bytes become
// floats sooner than pairs of bfloat16.
constexpr int64_t kFewRows = 6;

// Activations between two products, kept for the next call: fresh memory costs more than what is done with it.
class Buffers {
  public:
    // Memory for rows of `columns` numbers.
    Activations rows(int index, int64_t rows, int64_t columns, int32_t type) {
        const int64_t bytes = rows * columns * (type == kBfloat16 ? 2 : 4);
        if (bytes > sizes_[index]) {
            memory_[index].reset();
            sizes_[index] = 0;
            memory_[index].reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
            sizes_[index] = bytes;
        }
        return {memory_[index].get(), columns, type};
    }

  private:
    struct Free {
        void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(64)); }
    };
    std::unique_ptr<char, Free> memory_[6];
    int64_t sizes_[6] = {};
};

thread_local Buffers buffers;

char* at(const Activations& x, int64_t element) {
    return static_cast<char*>(x.data) + element * (x.type == kBfloat16 ? 2 : 4);
}

// Rows of bfloat16 as floats.
Activations widened(const Activations& x, int64_t rows, int64_t columns) {
    const Activations wide = buffers.rows(5, rows, columns, kFloat32);
    for (int64_t row = 0; row < rows; ++row) {
        const auto* from = static_cast<const uint16_t*>(x.data) + row * x.stride;
        auto* to = static_cast<float*>(wide.data) + row * columns;
        for (int64_t i = 0; i < columns; ++i) to[i] = widen(from[i]);
    }
    return wide;
}

// The slots of all rows of a batch.
std::vector<int64_t> slots_of(const Attention& batch) {
    std::vector<int64_t> slots(batch.query_starts[batch.sequences]);
    const int64_t block = batch.panels_per_block * kPanel;
    for (int64_t sequence = 0; sequence < batch.sequences; ++sequence) {
        const int32_t* table = batch.block_tables + sequence * batch.table_stride;
        const int64_t end = batch.query_starts[sequence + 1];
        for (int64_t row = batch.query_starts[sequence]; row < end; ++row) {
            const int64_t position = batch.context_lens[sequence] - end + row;
            slots[row] = table[position / block] * block + position % block;
        }
    }
    return slots;
}

}  // namespace

void multiply(const Linear& layer, const Activations& x, int64_t rows, const Activations& target, Action action,
              int threads) {
    const Kernel& used = kernel();
    if (layer.storage == kInt8 && x.type == kBfloat16 && rows <= kFewRows)
        return multiply(layer, widened(x, rows, layer.inputs), rows, target, action, threads);
    const int64_t across = (layer.outputs + kLinearOutputs - 1) / kLinearOutputs;
    // Items with the same rows follow each other, so that the rows stay in the second-level cache.
    share(threads, (rows + kLinearRows - 1) / kLinearRows * across, [&](int64_t item) {
        const int64_t first = item / across * kLinearRows;
        used.multiply(layer, x, first, int(std::min<int64_t>(kLinearRows, rows - first)), item % across * kLinearOutputs,
                      target, action);
    });
}

void tally(const Linear& layer, const Activations& x, int64_t rows, const Tally& tally, int threads) {
    const Kernel& used = kernel();
    const int64_t blocks = (rows + kLinearRows - 1) / kLinearRows;
    const int64_t panels = (layer.outputs + kLinearOutputs - 1) / kLinearOutputs;
    share(threads, blocks * tally.parts, [&](int64_t item) {
        const int64_t part = item / blocks, first = item % blocks * kLinearRows;
        used.tally(layer, x, first, int(std::min<int64_t>(kLinearRows, rows - first)), rows,
                   part * panels / tally.parts * kLinearOutputs, (part + 1) * panels / tally.parts * kLinearOutputs, part,
                   tally);
    });
}

void decode(const Decoder& decoder, const Attention& batch, int64_t first, int64_t last, float* x, float* out) {
    const Kernel& used = kernel();
    const int64_t rows = batch.query_starts[batch.sequences], hidden = decoder.hidden;
    const int32_t type = decoder.type == kBfloat16 && used.bfloat16 ? kBfloat16 : kFloat32;
    const int threads = batch.threads;
    const Cache& shape = decoder.layers[0].cache;
    const int64_t head_dim = shape.head_dim;
    const Activations residual{x, hidden, kFloat32}, normed = buffers.rows(0, rows, hidden, type),
                      projected = buffers.rows(1, rows, 3 * hidden, type),
                      attended = buffers.rows(2, rows, hidden, type),
                      inner = buffers.rows(3, rows, decoder.layers[0].up.outputs, type);
    const auto normalise = [&](const Norm& norm, const Activations& target) {
        share(threads, (rows + kNormRows - 1) / kNormRows, [&](int64_t item) {
            const int64_t first = item * kNormRows;
            used.normalise(norm, x, hidden, decoder.epsilon, first, std::min(kNormRows, rows - first), target);
        });
    };

    Attention attention = batch;
    attention.cache = shape;
    attention.query = projected.data;
    attention.query_row_stride = 3 * hidden;
    attention.query_head_stride = 3 * head_dim;
    attention.query_type = type;
    attention.output = attended.data;
    attention.lse = static_cast<float*>(buffers.rows(4, rows, shape.heads, kFloat32).data);
    const Plan plan = make_plan(attention, threads);
    const std::vector<int64_t> slots = slots_of(batch);

    for (int64_t index = first; index < last; ++index) {
        const Layer& layer = decoder.layers[index];
        attention.cache = layer.cache;
        attention.encoding = layer.encoding;
        normalise(layer.attention_norm, normed);
        multiply(layer.query_key_value, normed, rows, projected, kStore, threads);
        const Source key{at(projected, head_dim), 3 * hidden, 3 * head_dim};
        const Source value{at(projected, 2 * head_dim), 3 * hidden, 3 * head_dim};
        write(layer.cache, key, value, type, slots.data(), rows, threads);
        attend(attention, plan);
        if (decoder.parallel_residual) normalise(layer.mlp_norm, normed);
        multiply(layer.dense, attended, rows, residual, kAdd, threads);
        if (!decoder.parallel_residual) normalise(layer.mlp_norm, normed);
        multiply(layer.up, normed, rows, inner, decoder.gelu_tanh ? kStoreGeluTanh : kStoreGelu, threads);
        multiply(layer.down, inner, rows, residual, kAdd, threads);
    }
    if (last == decoder.num_layers) normalise(decoder.norm, {out, hidden, kFloat32});
}

}  // namespace dape
