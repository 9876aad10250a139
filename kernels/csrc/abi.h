// The C interface between dape_kernels/cpu and the library: plain structs and functions, mirrored field by
// field in library.py. Letters: T rows of a ragged batch, S sequences, H heads, d head size, D width.
#pragma once

#include <cstdint>

namespace dape {

// Keys in one panel of the cache; blocks hold a whole number of panels.
constexpr int kPanel = 16;

enum Storage : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// Keys and values of one layer. All tensors consist of 32-bit words: a float, two bfloat16 or four int8
// ("lanes", G of them), so that a vector load gives the same word of 16 keys or of 16 elements.
struct Cache {
    uint32_t* key;       // [panels, H, d / G, 16]: word (e / G, key) holds elements e .. e + G - 1 of a key
    uint32_t* value;     // [panels, H, 16 / G, dv]: word (key / G, e) holds keys key .. key + G - 1; dv = d
                         // rounded up to 16
    float* key_scale;    // [panels, H, 16], int8 only: element = lane * scale of its key
    float* value_scale;  // [panels, H, 16], int8 only
    int64_t panels;
    int32_t heads;
    int32_t head_dim;  // a multiple of 8
    int32_t storage;   // Storage
};

// The part of the scores that depends on positions only: C channels, functions of query i and key j.
// k = 1: the D hidden channels W1_B b + b1, then the H residual channels [b] + b2 (H without DAPE);
// k > 1: the H biases b, inputs of the convolution. C = 0: there is none.
struct Positional {
    int32_t channels;
    int32_t knots;          // > 0: piecewise linear in x = ramp(i - j) * inverse_norm(i), else a table
    const float* table;     // [C, stride]: entry `origin` - (i - j); entries behind `origin` are zero
    int64_t stride;         // floats from one channel to the next
    int64_t origin;         // index of distance 0; distances up to `origin` are tabulated
    const float* ramp;      // reversed as the table, one channel, rising with the distance
    const float* inverse_norm;  // by query position
    const float* knot;      // [knots], rising
    const float* offset;    // [knots + 1, C]: channel = offset[s] + slope[s] * x in segment s, where s is the
    const float* slope;     // number of knots below x
};

// One layer's score function. Scores are in units of log 2: the query is scaled by log2(e) / sqrt(d) and the
// weights and tables are scaled to match, so that weights are 2^score.
struct Encoding {
    float query_scale;
    int32_t width;          // D; 0 without DAPE
    int32_t kernel;         // k: 1, 3 or 5
    int32_t inputs;         // channels of the first convolution: H, or 2 H with biases (k > 1)
    int32_t keeps_scores;   // whether the residual A is added
    int32_t keeps_bias;     // whether the residual b is added (k > 1; k = 1 has it in the residual channels)
    const float* first;     // [k, inputs, D]
    const float* hidden_bias;  // [D], k > 1
    const float* second;    // [k, D, H]
    const float* out_bias;  // [H], k > 1
    Positional positional;
};

struct Attention {
    Cache cache;
    Encoding encoding;
    const void* query;  // [T, H, d], elements of a head adjacent
    int64_t query_row_stride, query_head_stride;
    void* output;  // [T, H, d], contiguous, of the query's type
    float* lse;    // [T, H], contiguous, natural logarithm
    int32_t query_type;  // kFloat32 or kBfloat16; with bfloat16, products are bfloat16 where the processor can
    int32_t threads;
    int64_t sequences;
    const int64_t* query_starts;   // [S + 1]
    const int64_t* context_lens;   // [S]
    const int32_t* block_tables;   // [S, table_stride]
    int64_t table_stride;
    int64_t panels_per_block;
    // Where keys are spread over ranks (k = 1 only): of every `ranks` * `stripe` keys, the `rank`th `stripe` are here.
    int64_t rank, ranks;  // ranks 0: all keys are here
    int64_t stripe;       // a multiple of kTile
};

// A linear layer, y = x W^T + b, its weights packed like the keys of one head: panels of 16 outputs, G inputs in a word.
struct Linear {
    const uint32_t* weight;  // [panels, inputs / G, 16]; panels = outputs rounded up to 64, / 16
    const float* scale;      // [panels * 16], int8 only: weight = lane * scale of its output
    const float* bias;       // [panels * 16], or null
    int64_t inputs;          // a multiple of 8
    int64_t outputs;
    int32_t storage;  // Storage
};

// What the outputs of a linear layer say of one of them in each row: enough for its log-probability and rank, and for
// the log-probability of the likeliest. Outputs are counted in `parts` ranges, each with a peak, a total, a count and a
// largest output of its own, to be put together by the caller.
struct Tally {
    const int64_t* target;  // [rows]
    const float* mark;      // [rows]
    float* own;             // [rows]: the target's output
    float* peak;            // [parts, rows]: no output is above it by more than 20
    float* total;           // [parts, rows]: sum of exp(output - peak)
    float* above;           // [parts, rows]: outputs above the mark, exact to 2^24
    float* best;            // [parts, rows]: the largest output, -1e30 where none is above that
    int64_t* best_id;       // [parts, rows]: which it is, the first of those that are equal
    int64_t parts;
};

struct Norm {
    const float* weight;  // [h]
    const float* bias;    // [h]
};

// One pre-norm block of the GPT-NeoX form.
struct Layer {
    Norm attention_norm, mlp_norm;
    Linear query_key_value;  // outputs [H, 3, d]
    Linear dense, up, down;
    Cache cache;
    Encoding encoding;
};

struct Decoder {
    const Layer* layers;
    int64_t num_layers;
    Norm norm;  // behind the layers
    int64_t hidden;
    float epsilon;              // of all norms
    int32_t parallel_residual;  // x + attention(norm(x)) + mlp(norm'(x))
    int32_t type;               // of activations between products: kFloat32, or kBfloat16 where the processor can
    int32_t gelu_tanh;          // whether GELU is its tanh approximation
};

// The score network of one layer on whole blocks of pairs, in training: [scores] + W2 leaky(W1 scores + hidden).
struct Adapter {
    const float* first;   // [D, H]
    const float* second;  // [H, D]
    const void* scores;   // [H, sequences, pairs]
    const void* hidden;   // [D, pairs], the same for all sequences
    int64_t sequences;
    int64_t pairs;
    int32_t heads;
    int32_t width;
    int32_t keeps_scores;
    int32_t type;  // of all tensors over pairs: kFloat32 or kBfloat16
    int32_t threads;
};

struct AdapterGradients {
    const void* adapted;  // [H, sequences, pairs], in the result
    void* scores;         // [H, sequences, pairs], as all further ones to be written
    float* hidden;        // [D, pairs], summed over sequences
    float* first;         // [parts, D, H], to be summed over parts
    float* second;        // [parts, H, D]
    int64_t parts;        // pieces of work that threads share
};

}  // namespace dape

extern "C" {

// Build in use: an instruction set, "avx512", "avx2" or "portable", where there are several followed by what multiplies
// bfloat16: "+amx" matrix units, "+bf16" vectors, "+fp32" nothing, so it is widened.
const char* dape_isa();
// Choose an instruction set ("auto": the best) or one build. Returns 0, or 1 if this processor or library lacks it.
int32_t dape_set_isa(const char* name);

// Bytes of the structures above, in their order: whoever calls may have been written for others.
void dape_struct_sizes(int64_t sizes[11]);

// Compute attention of all rows. Returns 0, or 1 if memory ran out.
int32_t dape_attend(const dape::Attention* attention);

// Run layers `first` to `last` - 1 on the hidden states x [T, h] of a batch, which they replace; after the last of all
// layers `out` [T, h] has them behind the last norm. Of `batch` only what describes the rows and the threads is used.
// Returns 0, or 1 if memory ran out.
int32_t dape_decode(const dape::Decoder* decoder, const dape::Attention* batch, int64_t first, int64_t last, float* x,
                    float* out);

// Results [rows, outputs] of a layer as floats, for rows of `type` that are `stride` apart.
void dape_linear(const dape::Linear* layer, const void* x, int32_t type, int64_t stride, int64_t rows, float* out,
                 int32_t threads);

// Tally the results of a layer, as of dape_linear, without storing them.
void dape_tally(const dape::Linear* layer, const void* x, int32_t type, int64_t stride, int64_t rows,
                const dape::Tally* tally, int32_t threads);

// Store keys and values [T, H, d] of `source_type` in slots [T] (slot = panel * 16 + place).
void dape_write(const dape::Cache* cache, const void* key, const void* value, int32_t source_type,
                int64_t key_row_stride, int64_t key_head_stride, int64_t value_row_stride,
                int64_t value_head_stride, const int64_t* slots, int64_t rows, int32_t threads);
// Copy keys and values of slots [n] as float32 [H, n, d].
void dape_read(const dape::Cache* cache, const int64_t* slots, int64_t count, float* key, float* value);

// The network's results [H, sequences, pairs]. Returns 0, or 1 if memory ran out.
int32_t dape_adapt(const dape::Adapter* adapter, void* adapted);
// Gradients by those in the results. Returns 0, or 1 if memory ran out.
int32_t dape_adapt_backward(const dape::Adapter* adapter, const dape::AdapterGradients* gradients);
}
