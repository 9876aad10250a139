// The products of a tile on matrix units (Intel AMX), 16 rows at a time: bfloat16 in, float sums.
#pragma once

#include "scratch.h"

namespace dape::DAPE_ISA {

// Rows and columns of a matrix tile, and the depth of one product: full, or half where a panel ends.
constexpr int kMatrix = 16, kDepth = 32, kHalf = 16;

#if defined(__AMX_BF16__)

constexpr bool kHasMatrix = true;

// Shapes of the tile registers for the life of this object. 0 to 3: sums. 4 and 5: left and right factor,
// 6 and 7: the same of half depth. Right factors are rows of words that hold two values of the inner dimension,
// which is how the cache and the packed scores lie in memory.
class MatrixMode {
  public:
    ~MatrixMode() { _tile_release(); }
    MatrixMode() = default;
    MatrixMode(const MatrixMode&) = delete;

    // Let left factors and sums have so many rows, 1 to 16: products take a time in proportion.
    void use_rows(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        const auto own = uint8_t(rows);
        alignas(64) const struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
            uint8_t rows[16];
        } shapes{.rows = {own, own, own, own, own, 16, own, 8}};
        _tile_loadconfig(&shapes);
    }

  private:
    int rows_ = 0;
};

// Fetch `rows` rows of tiles that lie `stride` words apart.
template <int Tiles>
inline void prefetch_rows(const uint32_t* words, int64_t stride, int rows) {
    for (int row = 0; row < rows; ++row)
        for (int tile = 0; tile < Tiles; ++tile) prefetch(words + row * stride + tile * kMatrix);
}

// Scores of as many queries as rows are in use and 4 panels of keys: out[rows, 4 * 16], added to what is there if Adds.
//   query: bfloat16, rows `stride` apart; keys: words of each panel; next: panels that are needed after these,
//   fetched on the way (null: none); dim: a multiple of 16.
template <bool Adds = false>
inline void matrix_scores(const uint16_t* query, int64_t stride, const uint32_t* const* keys,
                          const uint32_t* const* next, int dim, float* out, int64_t out_stride) {
    if constexpr (Adds) {
        _tile_loadd(0, out, out_stride * 4);
        _tile_loadd(1, out + kMatrix, out_stride * 4);
        _tile_loadd(2, out + 2 * kMatrix, out_stride * 4);
        _tile_loadd(3, out + 3 * kMatrix, out_stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    int element = 0;
    for (; element + kDepth <= dim; element += kDepth) {
        const int64_t word = element / 2 * kPanel;
        _tile_loadd(4, query + element, stride * 2);
        _tile_loadd(5, keys[0] + word, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, keys[1] + word, 64);
        _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(5, keys[2] + word, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, keys[3] + word, 64);
        _tile_dpbf16ps(3, 4, 5);
        if (next)
            for (int panel = 0; panel < 4; ++panel) prefetch_rows<1>(next[panel] + word, kPanel, kDepth / 2);
    }
    if (element < dim) {
        const int64_t word = element / 2 * kPanel;
        _tile_loadd(6, query + element, stride * 2);
        _tile_loadd(7, keys[0] + word, 64);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, keys[1] + word, 64);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, keys[2] + word, 64);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(7, keys[3] + word, 64);
        _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, out, out_stride * 4);
    _tile_stored(1, out + kMatrix, out_stride * 4);
    _tile_stored(2, out + 2 * kMatrix, out_stride * 4);
    _tile_stored(3, out + 3 * kMatrix, out_stride * 4);
}

// out[rows, Tiles * 16] += weights times values of some panels, Tiles 1 or 4.
//   weights: bfloat16, rows `stride` apart, by key; values: words of each panel at the first element wanted,
//   `value_stride` from one pair of keys to the next; all 16 keys of a panel count; next: as of `matrix_scores`.
template <int Tiles>
inline void matrix_outputs(const uint16_t* weights, int64_t stride, const uint32_t* const* values,
                           const uint32_t* const* next, int64_t value_stride, int panels, float* out,
                           int64_t out_stride) {
    _tile_loadd(0, out, out_stride * 4);
    if constexpr (Tiles == 4) {
        _tile_loadd(1, out + kMatrix, out_stride * 4);
        _tile_loadd(2, out + 2 * kMatrix, out_stride * 4);
        _tile_loadd(3, out + 3 * kMatrix, out_stride * 4);
    }
    for (int panel = 0; panel < panels; ++panel) {
        _tile_loadd(6, weights + panel * kPanel, stride * 2);
        _tile_loadd(7, values[panel], value_stride * 4);
        _tile_dpbf16ps(0, 6, 7);
        if constexpr (Tiles == 4) {
            _tile_loadd(7, values[panel] + kMatrix, value_stride * 4);
            _tile_dpbf16ps(1, 6, 7);
            _tile_loadd(7, values[panel] + 2 * kMatrix, value_stride * 4);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(7, values[panel] + 3 * kMatrix, value_stride * 4);
            _tile_dpbf16ps(3, 6, 7);
        }
        if (next) prefetch_rows<Tiles>(next[panel], value_stride, kPanel / 2);
    }
    _tile_stored(0, out, out_stride * 4);
    if constexpr (Tiles == 4) {
        _tile_stored(1, out + kMatrix, out_stride * 4);
        _tile_stored(2, out + 2 * kMatrix, out_stride * 4);
        _tile_stored(3, out + 3 * kMatrix, out_stride * 4);
    }
}

// 16 outputs of a layer of the score network on 64 columns, with 16 rows in use: out = fixed + weight times in.
//   fixed: [16, fixed_stride]; weight: bfloat16 [16, depth]; in: words [depth / 2, kTile]; depth: a multiple
//   of kDepth; out: [16, kTile].
inline void matrix_layer(const float* fixed, int64_t fixed_stride, const uint16_t* weight, const uint32_t* in,
                         int depth, float* out) {
    _tile_loadd(0, fixed, fixed_stride * 4);
    _tile_loadd(1, fixed + kMatrix, fixed_stride * 4);
    _tile_loadd(2, fixed + 2 * kMatrix, fixed_stride * 4);
    _tile_loadd(3, fixed + 3 * kMatrix, fixed_stride * 4);
    for (int k = 0; k < depth; k += kDepth) {
        const uint32_t* words = in + k / 2 * kTile;
        _tile_loadd(4, weight + k, depth * 2);
        _tile_loadd(5, words, kTile * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, words + kMatrix, kTile * 4);
        _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(5, words + 2 * kMatrix, kTile * 4);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, words + 3 * kMatrix, kTile * 4);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, out, kTile * 4);
    _tile_stored(1, out + kMatrix, kTile * 4);
    _tile_stored(2, out + 2 * kMatrix, kTile * 4);
    _tile_stored(3, out + 3 * kMatrix, kTile * 4);
}

#else

// Declared for code that is compiled for every instruction set and runs on none of these.
constexpr bool kHasMatrix = false;
struct MatrixMode {
    void use_rows(int) {}
};
template <bool Adds = false>
void matrix_scores(const uint16_t* query, int64_t stride, const uint32_t* const* keys, const uint32_t* const* next,
                   int dim, float* out, int64_t out_stride);
template <int Tiles>
void matrix_outputs(const uint16_t* weights, int64_t stride, const uint32_t* const* values, const uint32_t* const* next,
                    int64_t value_stride, int panels, float* out, int64_t out_stride);
void matrix_layer(const float* fixed, int64_t fixed_stride, const uint16_t* weight, const uint32_t* in, int depth,
                  float* out);

#endif

}  // namespace dape::DAPE_ISA
