// Products of an item's rows with the keys and values of a tile, as they lie in the cache.
#pragma once

#include "bytes.h"
#include "matrix.h"

namespace dape::DAPE_ISA {

// G: lanes of a cache word; Pairs: whether products are bfloat16, or of bytes if the cache holds bytes.
template <int G, bool Pairs>
class CacheProducts {
  public:
    static constexpr bool kBytes = Pairs && G == 4;
    // Whether keys and values are fetched a tile ahead of their products rather than a head: those of bytes are done
    // before the next head's have come.
    static constexpr bool kTileAhead = kBytes;
    static constexpr int kPlanes = kBytes ? 2 : 1;  // of queries and weights: high bytes, then low bytes
    using Weight = std::conditional_t<kBytes, uint8_t, std::conditional_t<Pairs, uint16_t, float>>;

    // The weights of a tile.
    struct Weights {
        Weight* data;    // [rows, stride], of a row [H, planes, kTile]
        int64_t stride;
        float* scale;    // [H, rows], bytes only
        float* fade;     // [H, rows]: what the tile's new reference leaves of earlier outputs
    };

    CacheProducts(const Attention& attention, int rows, Arena& arena)
        : a_(attention), heads_(attention.cache.heads), dim_(attention.cache.head_dim),
          padded_dim_((dim_ + kPanel - 1) / kPanel * kPanel), rows_(rows),
          on_matrix_(Pairs && !kBytes && kHasMatrix && dim_ % kHalf == 0),
          room_(on_matrix_ && rows > kMatrix ? (rows + kMatrix - 1) / kMatrix * kMatrix : rows),
          query_(arena.take<Weight>(heads_ * room_ * dim_ * kPlanes)),
          query_scale_(kBytes ? arena.take<float>(heads_ * rows) : nullptr),
          output_(arena.take<float>(heads_ * room_ * padded_dim_)),
          last_values_(on_matrix_ ? arena.take<uint32_t>(kPanel / 2 * padded_dim_) : nullptr) {}

    // Rows of scores and weights that there must be memory for: whole matrix tiles.
    int room() const { return room_; }
    // Rows of a product on matrix units.
    int matrix_rows() const { return on_matrix_ ? int(least(rows_, kMatrix)) : kMatrix; }
    // Outputs [d] of a row, to be divided by its sum of weights.
    const float* output(int row, int head) const { return output_ + (head * room_ + row) * padded_dim_; }

    // Scales of the values of a panel's keys [H, kPanel], int8 only.
    const float* value_scales(int64_t position) const {
        return a_.cache.value_scale + panel_of(position) * heads_ * kPanel;
    }

    // Get ready for the rows of an item.
    void begin(const Item& item) {
        item_ = &item;
        load_queries();
        __builtin_memset(output_, 0, sizeof(float) * heads_ * room_ * padded_dim_);
    }

    // Scores of the keys from `first`, as far as the item's rows can see any.
    // out: of the first row and head, rows `row_stride` and heads `head_stride` apart.
    void compute_scores(int64_t first, float* out, int64_t row_stride, int64_t head_stride) {
        const int64_t end = item_->position + rows_;
        const int columns = clip(end - first, 0, kTile), first_row = first_seeing(first);
        if (columns == 0) return;
        // Of the keys, and behind them of what is fetched ahead: of values, which are needed next, or of the next
        // tile's keys, see `kTileAhead`.
        const uint32_t* panels[2 * kTile / kPanel];
        const float* scales[kTile / kPanel];
        for (int p = 0; p * kPanel < columns; ++p) {
            const int64_t panel = panel_of(first + p * kPanel);
            panels[p] = a_.cache.key + panel * heads_ * key_words();
            panels[p + kTile / kPanel] =
                kTileAhead ? a_.cache.key + next_panel_of(first + p * kPanel) * heads_ * key_words()
                           : a_.cache.value + panel * heads_ * value_words();
            if constexpr (G == 4) {
                scales[p] = a_.cache.key_scale + panel * heads_ * kPanel;
                const int64_t next = next_panel_of(first + p * kPanel);
                for (int head = 0; head < heads_; ++head) {
                    prefetch(a_.cache.value_scale + (panel * heads_ + head) * kPanel);
                    prefetch(a_.cache.key_scale + (next * heads_ + head) * kPanel);
                }
            }
        }
        if constexpr (Pairs && !kBytes && kHasMatrix)
            if (on_matrix_) return compute_on_matrix(panels, columns, first_row, out, row_stride, head_stride);
        const int last = (columns - 1) / kPanel;
        using Sizes = std::conditional_t<kBytes, ByteRows, Rows>;
        for (int head = 0; head < heads_; ++head)
            for (int column = 0; column < columns; column += kColumns * kLanes) {
                const uint32_t *keys[kColumns], *next[kColumns];
                const float* scale[kColumns] = {};
                for (int n = 0; n < kColumns; ++n) {
                    // Panels that no row sees are read as the last one.
                    const int at = column + n * kLanes, p = int(least(at / kPanel, last)), lane = at % kPanel;
                    keys[n] = panels[p] + head * key_words() + lane;
                    next[n] = kTileAhead           ? panels[p + kTile / kPanel] + head * key_words() + lane
                              : head + 1 < heads_ ? keys[n] + key_words()
                                                   : panels[p + kTile / kPanel] + lane;
                    if constexpr (G == 4) scale[n] = scales[p] + head * kPanel + lane;
                }
                for (int row = first_row; row < rows_;)
                    row += with_largest(Sizes{}, rows_ - row, [&](auto m) {
                        const Weight* query = query_ + (head * room_ + row) * dim_ * kPlanes;
                        const uint32_t* const* ahead = row > first_row ? nullptr : next;
                        float* target = out + row * row_stride + head * head_stride + column;
                        if constexpr (kBytes)
                            byte_scores<m, kColumns>(query, query_scale_ + head * rows_ + row, keys, ahead, dim_ / G,
                                                     scale, target, row_stride);
                        else
                            score_tile<G, Pairs, m, kColumns>(query, dim_, keys, ahead, dim_ / G, scale, target,
                                                              row_stride);
                    });
            }
    }

    // Fade the outputs and add the weighted values of the keys from `first`, columns from `lower`.
    void add_values(int64_t first, int lower, const Weights& all) {
        const int count = int(least(kTile, least(item_->last_key, item_->position + rows_) - first)) - lower;
        if (count <= 0) return;
        const int first_row = first_seeing(first + lower);
        // Of the values, and behind them of what is fetched ahead: of the next tile's keys or values.
        const uint32_t* panels[2 * kTile / kPanel];
        for (int p = 0; p * kPanel < count; ++p) {
            const int64_t key = first + lower + p * kPanel, next = next_panel_of(key) * heads_;
            panels[p] = a_.cache.value + panel_of(key) * heads_ * value_words();
            panels[p + kTile / kPanel] =
                kTileAhead ? a_.cache.value + next * value_words() : a_.cache.key + next * key_words();
        }
        if constexpr (Pairs && !kBytes && kHasMatrix)
            if (on_matrix_) return add_on_matrix(panels, count, first_row, lower, all);
        using Sizes = std::conditional_t<kBytes, ByteRows, Rows>;
        for (int head = 0; head < heads_; ++head)
            for (int element = 0; element < padded_dim_;) {
                const uint32_t *values[kTile / kPanel], *next[kTile / kPanel];
                for (int p = 0; p * kPanel < count; ++p) {
                    values[p] = panels[p] + head * value_words() + element;
                    next[p] = kTileAhead           ? panels[p + kTile / kPanel] + head * value_words() + element
                              : head + 1 < heads_ ? values[p] + value_words()
                                                   : panels[p + kTile / kPanel] + element;
                }
                element += kLanes * with_largest(Columns{}, (padded_dim_ - element) / kLanes, [&](auto n) {
                    for (int row = first_row; row < rows_;)
                        row += with_largest(Sizes{}, rows_ - row, [&](auto m) {
                            const Weight* weights = all.data + row * all.stride + head * kTile * kPlanes + lower;
                            const uint32_t* const* ahead = row > first_row ? nullptr : next;
                            const float* fade = all.fade + head * rows_ + row;
                            float* output = output_ + (head * room_ + row) * padded_dim_ + element;
                            if constexpr (kBytes)
                                byte_outputs<m, n>(weights, all.stride, all.scale + head * rows_ + row, values,
                                                   ahead, padded_dim_, count, fade, output, padded_dim_);
                            else
                                output_tile<G, Pairs, m, n>(weights, all.stride, values, ahead, padded_dim_, count,
                                                            fade, output, padded_dim_);
                        });
                });
            }
    }

  private:
    // Words of one head in a panel.
    int64_t key_words() const { return int64_t(dim_) / G * kPanel; }
    int64_t value_words() const { return int64_t(kPanel) / G * padded_dim_; }

    int64_t panel_of(int64_t position) const {
        const int64_t panel = position / kPanel, per_block = a_.panels_per_block;
        return a_.block_tables[item_->sequence * a_.table_stride + panel / per_block] * per_block + panel % per_block;
    }

    // The panel as far into the next tile, or the last one.
    int64_t next_panel_of(int64_t position) const { return panel_of(least(position + kTile, item_->last_key - 1)); }

    // The first row of the first group of rows of which one sees the key at `first` or later ones.
    int first_seeing(int64_t first) const {
        const int group = on_matrix_ ? kMatrix : kRows;
        return clip(first - item_->position, 0, rows_ - 1) / group * group;
    }

    void load_queries() {
        const float scale = Pairs ? 1.0f : a_.encoding.query_scale;
        for (int row = 0; row < rows_; ++row)
            for (int head = 0; head < heads_; ++head) {
                const int64_t at = (item_->first_row + row) * a_.query_row_stride + head * a_.query_head_stride;
                Weight* target = query_ + (head * room_ + row) * dim_ * kPlanes;
                const auto* wide = static_cast<const float*>(a_.query) + at;
                const auto* narrow = static_cast<const uint16_t*>(a_.query) + at;
                if constexpr (kBytes) {
                    query_scale_[head * rows_ + row] = split_query(narrow, dim_, target);
                    continue;
                }
                for (int i = 0; i < dim_; ++i) {
                    if constexpr (Pairs) target[i] = narrow[i];
                    else target[i] = scale * (a_.query_type == kBfloat16 ? widen(narrow[i]) : wide[i]);
                }
            }
    }

    void compute_on_matrix(const uint32_t* const* panels, int columns, int first_row, float* out,
                           int64_t row_stride, int64_t head_stride) {
        const int last = (columns - 1) / kPanel;
        for (int head = 0; head < heads_; ++head) {
            const uint32_t *keys[kTile / kPanel], *next[kTile / kPanel];
            for (int p = 0; p < kTile / kPanel; ++p) {
                // Panels that no row sees are read as the last one.
                keys[p] = panels[least(p, last)] + head * key_words();
                next[p] = head + 1 < heads_ ? keys[p] + key_words() : panels[least(p, last) + kTile / kPanel];
            }
            for (int row = first_row; row < rows_; row += kMatrix)
                matrix_scores(query_ + (head * room_ + row) * dim_, dim_, keys, row > first_row ? nullptr : next, dim_,
                              out + row * row_stride + head * head_stride, row_stride);
        }
    }

    void add_on_matrix(const uint32_t* const* panels, int count, int first_row, int lower, const Weights& all) {
        const int used = (count + kPanel - 1) / kPanel, partial = count % kPanel;
        for (int head = 0; head < heads_; ++head) {
            const uint32_t* values[kTile / kPanel];
            for (int p = 0; p < used; ++p) values[p] = panels[p] + head * value_words();
            if (partial) values[used - 1] = present_values(values[used - 1], partial);
            for (int row = first_row; row < rows_; row += kMatrix) {
                float* output = output_ + (head * room_ + row) * padded_dim_;
                fade_outputs(output, all.fade + head * rows_ + row, int(least(kMatrix, rows_ - row)));
                const uint16_t* weights = all.data + row * all.stride + head * kTile + lower;
                for (int element = 0; element < padded_dim_;) {
                    const uint32_t *own[kTile / kPanel], *next[kTile / kPanel];
                    for (int p = 0; p < used; ++p) {
                        own[p] = values[p] + element;
                        next[p] = (head + 1 < heads_ ? panels[p] + (head + 1) * value_words() : panels[p + kTile / kPanel]) + element;
                    }
                    const bool four = element + 4 * kMatrix <= padded_dim_;
                    (four ? matrix_outputs<4> : matrix_outputs<1>)(weights, all.stride, own,
                                                                   row > first_row ? nullptr : next, padded_dim_, used,
                                                                   output + element, padded_dim_);
                    element += four ? 4 * kMatrix : kMatrix;
                }
            }
        }
    }

    // A copy of the first `count` values of a panel with zeros behind: what lies there may be no number.
    const uint32_t* present_values(const uint32_t* panel, int count) {
        for (int pair = 0; pair < kPanel / 2; ++pair) {
            const uint32_t mask = 2 * pair + 1 < count ? ~0u : 2 * pair < count ? 0xffffu : 0;
            for (int i = 0; i < padded_dim_; ++i) last_values_[pair * padded_dim_ + i] = panel[pair * padded_dim_ + i] & mask;
        }
        return last_values_;
    }

    void fade_outputs(float* output, const float* fade, int rows) {
        for (int row = 0; row < rows; ++row)
            if (fade[row] != 1.0f)
                for (int i = 0; i < padded_dim_; i += kLanes) {
                    float* values = output + row * padded_dim_ + i;
                    store(values, load(values) * splat(fade[row]));
                }
    }

    const Attention& a_;
    const int heads_, dim_, padded_dim_, rows_;
    const bool on_matrix_;
    const int room_;
    const Item* item_ = nullptr;
    Weight* query_;          // [H, room, planes, d]
    float* query_scale_;     // [H, rows], bytes only
    float* output_;          // [H, room, padded d]
    uint32_t* last_values_;  // one head's panel
};

}  // namespace dape::DAPE_ISA
