// The inner loop: rows of one segment times a panel of activations.
//
// A panel is [column][lanes], lanes = V vectors. A stored block of BR x BC values is BR*BC broadcasts and BR*BC*V fused
// multiply-adds on contiguous loads; R block rows of equal length go side by side where V alone leaves too few
// independent sums to hide the latency of the multiply-add.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace secateur::SECATEUR_ISA {

template <int V, int BR, int BC, int R, bool First>
SECATEUR_INLINE void multiply_rows(const float* w, const uint16_t* index, int blocks, const float* x, const uint16_t* rows,
                                   const float* bias, float* y) {
    constexpr int P = V * W, N = R * BR;
    vec sum[N][V];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        const int64_t row = static_cast<int64_t>(rows[n / BR]) * BR + n % BR;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
            sum[n][v] = First ? splat(bias ? bias[row] : 0.f) : load(y + row * P + v * W);
    }
    for (int j = 0; j < blocks; ++j) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float* column = x + static_cast<int64_t>(index[r * blocks + j]) * (BC * P);
            const float* value = w + static_cast<int64_t>(r * blocks + j) * (BR * BC);
#pragma GCC unroll 16
            for (int c = 0; c < BC; ++c) {
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) {
                    const vec xs = load(column + c * P + v * W);
#pragma GCC unroll 16
                    for (int b = 0; b < BR; ++b) sum[r * BR + b][v] += splat(value[b * BC + c]) * xs;
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        const int64_t row = static_cast<int64_t>(rows[n / BR]) * BR + n % BR;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(y + row * P + v * W, sum[n][v]);
    }
}

template <int V, int BR, int BC, bool First>
void multiply_segment(const Program& weight, const Segment& segment, const float* x, const float* bias, float* y) {
    constexpr int R = BR > 1 || V > 4 ? 1 : V > 2 ? 2 : 4;
    const float* w = weight.value() + segment.value * (BR * BC);
    const uint16_t* index = weight.index() + segment.value;
    const uint16_t* rows = weight.row() + segment.row;
    const Run* run = weight.run() + segment.run;
    for (int32_t k = 0; k < segment.runs; ++k) {
        const int blocks = run[k].blocks;
        int left = run[k].rows;
        if constexpr (R > 1) {
            for (; left >= R; left -= R) {
                multiply_rows<V, BR, BC, R, First>(w, index, blocks, x, rows, bias, y);
                w += static_cast<int64_t>(R) * blocks * (BR * BC), index += R * blocks, rows += R;
            }
        }
        for (; left > 0; --left) {
            multiply_rows<V, BR, BC, 1, First>(w, index, blocks, x, rows, bias, y);
            w += static_cast<int64_t>(blocks) * (BR * BC), index += blocks, ++rows;
        }
    }
}

}  // namespace secateur::SECATEUR_ISA
