// Linear maps of rows of vectors, without gradients. Weights are [rows, columns] as torch has them; numbers of columns
// are multiples of BLOCK.
#pragma once
#include <algorithm>

#include "matrix.h"

namespace hopescale {

constexpr int PANEL = TILE_VECTORS * LANES;

// A packed weight holds panels of PANEL rows, transposed: [panels, columns, PANEL].
struct LinearMap {
    const float* weight;
    int rows, columns;
    bool is_packed;
};

inline void pack(const LinearMap& map, float* packed) {
    for (int i = 0; i < map.rows; i += PANEL, packed += int64_t(PANEL) * map.columns) {
        const int count = std::min(PANEL, map.rows - i);
        for (int j = 0; j < map.columns; j += LANES)
            for (int k = 0; k < count; k += LANES)
                transpose_block(map.weight + int64_t(i + k) * map.columns + j, map.columns,
                                packed + int64_t(j) * PANEL + k, PANEL, std::min(LANES, count - k));
    }
}

// Maps COUNT vectors at once. Rows of the weight come one after the other: a processor reads memory several times as
// fast in one stream as in four.
template <int COUNT>
inline void map_vectors(const LinearMap& map, Matrix x, Matrix result, Update update) {
    const float* row = map.weight;
    for (int i = 0; i < map.rows; ++i, row += map.columns) {
        Lanes sum[COUNT] = {};
        for (int j = 0; j < map.columns; j += LANES) {
            const Lanes weight = load(row + j);
            for (int n = 0; n < COUNT; ++n) sum[n] += weight * load(x.row(n) + j);
        }
        for (int n = 0; n < COUNT; ++n) {
            float* at = result.row(n) + i;
            *at = update == ADD ? *at + total(sum[n]) : total(sum[n]);
        }
    }
}

// Multiplies by panels; the last one may be narrower.
inline void map_by_panels(const LinearMap& map, Matrix x, Matrix result, Update update) {
    const float* panel = map.weight;
    for (int i = 0; i < map.rows; i += PANEL, panel += int64_t(PANEL) * map.columns) {
        const int count = std::min(PANEL, map.rows - i);
        product(x, {const_cast<float*>(panel), map.columns, count, PANEL}, result.columns(i, count), update);
    }
}

// result (=, +=) x @ weight^T
inline void apply(const LinearMap& map, Matrix x, Matrix result, Update update = SET) {
    if (map.is_packed) {
        map_by_panels(map, x, result, update);
        return;
    }
    int n = 0;
    for (; n + 4 <= x.rows; n += 4) map_vectors<4>(map, x.block(n, 4), result.block(n, 4), update);
    for (; n < x.rows; ++n) map_vectors<1>(map, x.block(n, 1), result.block(n, 1), update);
}

}  // namespace hopescale
