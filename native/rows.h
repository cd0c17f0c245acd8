// Rows of a matrix that somebody chose: their dot products with one vector, and their sum with one factor each. Bound by
// memory: the rows that come next are fetched while these are computed, since the processor cannot guess which they are.
#pragma once

#include "activation.h"
#include "kernels.h"
#include "vec.h"

namespace secateur::SECATEUR_ISA {

constexpr int kTogether = 8;  // rows computed at a time: as many streams as the processor follows well

// Rows [at, at + R) of the list are added to y[first, last); the R after them are fetched.
template <int R>
SECATEUR_INLINE void add_some(const Rows& job, int64_t at, int64_t first, int64_t last, float* y) {
    const float *row[R], *next[R];
    vec factor[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        row[r] = job.weight + static_cast<int64_t>(job.index[at + r]) * job.cols;
        const int64_t later = at + R + r < job.count ? at + R + r : at + r;
        next[r] = job.weight + static_cast<int64_t>(job.index[later]) * job.cols;
        factor[r] = splat(job.factor[at + r]);
    }
    int64_t c = first;
    for (; c + W <= last; c += W) {
        vec sum = load(y + c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __builtin_prefetch(next[r] + c);
            sum += factor[r] * load(row[r] + c);
        }
        store(y + c, sum);
    }
    for (; c < last; ++c)
        for (int r = 0; r < R; ++r) y[c] += factor[r][0] * row[r][c];
}

inline void add_rows(const Rows& job, int64_t first, int64_t last, float* y) {
    int64_t at = 0;
    for (; at + kTogether <= job.count; at += kTogether) add_some<kTogether>(job, at, first, last, y);
    for (; at + 2 <= job.count; at += 2) add_some<2>(job, at, first, last, y);
    for (; at < job.count; ++at) add_some<1>(job, at, first, last, y);
}

template <int R>
SECATEUR_INLINE void dot_some(const Rows& job, int64_t at, const float* x, const float* bias, Activation activation, float* y) {
    const float *row[R], *next[R];
    vec sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        row[r] = job.weight + static_cast<int64_t>(job.index[at + r]) * job.cols;
        const int64_t later = at + R + r < job.count ? at + R + r : at + r;
        next[r] = job.weight + static_cast<int64_t>(job.index[later]) * job.cols;
        sum[r] = vec{};
    }
    int64_t c = 0;
    for (; c + W <= job.cols; c += W) {
        const vec xs = load(x + c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __builtin_prefetch(next[r] + c);
            sum[r] += xs * load(row[r] + c);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float lane[W], all = 0;
        store(lane, sum[r]);
        for (int64_t rest = c; rest < job.cols; ++rest) all += x[rest] * row[r][rest];
        for (int step = W / 2; step > 0; step /= 2)
            for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
        all += lane[0] + (bias ? bias[job.index[at + r]] : 0.f);
        y[at + r] = activation == Activation::none ? all : activate(splat(all), activation)[0];
    }
}

inline void dot_rows(const Rows& job, int64_t first, int64_t last, const float* x, const float* bias, Activation activation, float* y) {
    int64_t at = first;
    for (; at + kTogether <= last; at += kTogether) dot_some<kTogether>(job, at, x, bias, activation, y);
    for (; at < last; ++at) dot_some<1>(job, at, x, bias, activation, y);
}

}  // namespace secateur::SECATEUR_ISA
