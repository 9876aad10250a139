// Pieces of work and the functions of each instruction set that do them.
#pragma once

#include "abi.h"

namespace dape {

// Some adjacent rows of one sequence and a range of its keys.
struct Item {
    int64_t sequence;
    int64_t first_row;  // in the batch
    int64_t position;   // of the first row in its sequence
    int32_t rows;
    int64_t first_key;  // a multiple of kTile
    int64_t last_key;   // one behind the last; a multiple of kTile or the position behind the last row
    float* part;        // null: the rows are complete and go to the output; else [rows, H, d + 1]: outputs of
                        // this range of keys and the log2 of the sum of their weights
};

// Keys of a tile.
constexpr int kTile = 64;

// Queries that share the keys and values of a tile. With fewer, a tile costs more to fetch than its products hide; with
// more, their outputs, scores and weights leave the second-level cache. Floats are twice as long to fetch.
static inline int rows_per_item(const Cache& cache) {
    if (cache.heads > 32) return 48;
    return cache.heads <= 16 && cache.storage == kFloat32 ? 144 : 96;
}

// Rows of activations, `stride` elements apart.
struct Activations {
    void* data;
    int64_t stride;
    int32_t type;  // kFloat32 or kBfloat16
};

// What a linear layer does with its results.
enum Action : int32_t { kStore, kStoreGelu, kStoreGeluTanh, kAdd };

// Rows and outputs of a linear layer that are one piece of work.
constexpr int kLinearRows = 192, kLinearOutputs = 64;

// Pairs of one sequence that the score network of training works on together.
constexpr int kAdapterPairs = 128;

struct Kernel {
    const char* name;
    bool bfloat16;  // whether it multiplies bfloat16
    int64_t (*scratch_bytes)(const Attention& attention);
    // call: a number above 0 that items of the same call share; scratch: 64-byte aligned, it starts with 8 bytes
    // of zeros or as the thread's last item left it, its further content is of no importance.
    void (*walk)(const Attention& attention, const Item& item, uint64_t call, void* scratch);
    // The layer's results in up to kLinearRows rows and the kLinearOutputs outputs from `output` on.
    void (*multiply)(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t output,
                     const Activations& target, Action action);
    // Tally up to kLinearRows of `all_rows` rows over the outputs from `output` to `end`, multiples of kLinearOutputs.
    void (*tally)(const Linear& layer, const Activations& x, int64_t first_row, int rows, int64_t all_rows,
                  int64_t output, int64_t end, int64_t part, const Tally& tally);
    // The norm of some rows of x [T, hidden].
    void (*normalise)(const Norm& norm, const float* x, int64_t hidden, float epsilon, int64_t first_row, int64_t rows,
                      const Activations& target);
    int64_t (*adapter_bytes)(const Adapter& adapter);
    // The pairs from `tile` * kAdapterPairs on, of all sequences.
    void (*adapt)(const Adapter& adapter, int64_t tile, void* adapted, void* scratch);
    // Every `parts`-th tile from `part` on, and what these add to the gradients in weights.
    void (*adapt_backward)(const Adapter& adapter, int64_t part, const AdapterGradients& gradients, void* scratch);
};

}  // namespace dape
