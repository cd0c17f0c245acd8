// Depthwise convolution of one channel: every tap is one broadcast times contiguous pixels, whatever the stride.
//
// Rows of the padded plane are taken as one long line, so that small images fill whole vectors too; the sums that belong to
// the border are left out when rows are copied to the output, with the activation.
#pragma once

#include "activation.h"
#include "kernels.h"
#include "vec.h"

namespace secateur::SECATEUR_ISA {

template <int V>
SECATEUR_INLINE void sum_taps(const Depthwise& job, int64_t first) {
    vec sum[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = splat(job.bias);
    for (int64_t t = 0; t < job.taps; ++t) {
        const float* from = job.plane + job.offset[t] + first;
        const vec w = splat(job.weight[t]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[v] += w * load(from + v * W);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(job.sums + first + v * W, sum[v]);
}

inline void depthwise(const Depthwise& job) {
    static_assert(6 * W <= kDepthwiseSlack);
    const int64_t positions = (job.out_h - 1) * job.width + job.out_w;
    int64_t first = 0;
    for (; positions - first > 2 * W; first += 6 * W) sum_taps<6>(job, first);
    for (; first < positions; first += 2 * W) sum_taps<2>(job, first);
    for (int64_t r = 0; r < job.out_h; ++r) {
        const float* from = job.sums + r * job.width;
        float* to = job.y + r * job.out_w;
        int64_t c = 0;
        for (; c + W <= job.out_w; c += W) store(to + c, activate(load(from + c), job.activation));
        if (c == job.out_w) continue;
        float part[W];
        store(part, activate(load(from + c), job.activation));
        for (int64_t l = c; l < job.out_w; ++l) to[l] = part[l - c];
    }
}

}  // namespace secateur::SECATEUR_ISA
