// The positional channels of the rows of an item, for the columns of one tile.
#pragma once

#include "scratch.h"

namespace dape::DAPE_ISA {

class PositionalRows {
  public:
    PositionalRows(const Positional& positional, int rows, Arena& arena)
        : p_(positional), rows_(rows), in_place_(rows == 1 && !p_.knots),
          stride_(in_place_ ? p_.stride : p_.knots ? kTile : (kTile + rows + kPanel - 1) / kPanel * kPanel),
          values_(in_place_ ? nullptr : arena.take<float>((p_.channels + kPanel) * stride_)) {}

    int channels() const { return p_.channels; }
    int64_t stride() const { return stride_; }

    // Get ready for rows from `position` and columns from `first`. A table depends on the distance only, so
    // all rows read one strip of it, each a column further left than the row above.
    void begin(int64_t position, int64_t first) {
        position_ = position;
        if (p_.knots || !p_.channels) return;
        strip_ = p_.table + p_.origin - (position + rows_ - 1 - first);
        const int64_t width = in_place_ ? kTile : stride_;
        for (int channel = 0; channel < p_.channels; ++channel)
            for (int i = 0; i < width; i += kPanel) {
                const float* at = strip_ + channel * p_.stride + i;
                // There are too many strips for the processor to guess what the next tile needs.
                prefetch(at + kTile);
                if (in_place_) continue;
                for (int n = 0; n < kPanel; n += kLanes) store(values_ + channel * stride_ + i + n, load(at + n));
            }
    }

    // Channels [channels, stride] of a row in the columns from `first`; valid until the next call. There are up to
    // 16 more rows of any content, for those who read whole matrix tiles.
    const float* of(int row, int64_t first) {
        if (in_place_) return strip_;
        if (!p_.knots) return values_ + (rows_ - 1 - row);
        evaluate(position_ + row, first);
        return values_;
    }

  private:
    int segment(float x) const {
        int knots = 0;
        while (knots < p_.knots && p_.knot[knots] < x) ++knots;
        return knots;
    }

    void evaluate(int64_t query, int64_t first) {
        const float* ramp = p_.ramp + p_.origin - (query - first);
        const Floats factor = splat(p_.inverse_norm[query]);
        for (int column = 0; column < kTile; column += kLanes) {
            const Floats x = load(ramp + column) * factor;
            float lanes[kLanes];
            store(lanes, x);
            // x falls from left to right, and mostly within one segment.
            const int high = segment(lanes[0]), low = segment(lanes[kLanes - 1]);
            for (int channel = 0; channel < p_.channels; ++channel) {
                Floats y = line(low, channel, x);
                for (int s = low + 1; s <= high; ++s)
                    y = where_above(x, splat(p_.knot[s - 1]), line(s, channel, x), y);
                store(values_ + channel * stride_ + column, y);
            }
        }
    }

    Floats line(int segment, int channel, Floats x) const {
        const int64_t at = int64_t(segment) * p_.channels + channel;
        return fma(splat(p_.slope[at]), x, splat(p_.offset[at]));
    }

    const Positional& p_;
    const int rows_;
    const bool in_place_;  // one row reads the table itself
    const int64_t stride_;
    float* values_;
    const float* strip_ = nullptr;
    int64_t position_ = 0;
};

}  // namespace dape::DAPE_ISA
