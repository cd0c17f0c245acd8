#include "gathered.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "parallel.h"

namespace secateur {

namespace {

constexpr int64_t kLine = 64;  // floats: the least that a thread is given of an output

void check_rows(const Rows& job, int64_t rows) {
    for (int64_t i = 0; i < job.count; ++i)
        if (job.index[i] < 0 || job.index[i] >= rows) throw std::invalid_argument("an index is outside of the rows of the weight");
}

void add(const Kernels& kernels, const Rows& job, const float* bias, float* y, int threads) {
    const int64_t lines = (job.cols + kLine - 1) / kLine, parts = std::min<int64_t>(std::max(threads, 1), lines);
    parallel(parts, threads, [&](int64_t part) {
        const int64_t first = lines * part / parts * kLine, last = std::min(lines * (part + 1) / parts * kLine, job.cols);
        if (bias)
            std::memcpy(y + first, bias + first, sizeof(float) * (last - first));
        else
            std::fill(y + first, y + last, 0.f);
        kernels.add_rows(job, first, last, y);
    });
}

}  // namespace

int64_t thin(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const float* x, Large large, const float* bias, float* y, int threads) {
    float* kept = scratch(Scratch::input, 2 * rows);
    auto* index = reinterpret_cast<int32_t*>(kept + rows);
    int64_t count = 0;
    for (int64_t j = 0; j < rows; ++j) {  // NaN is not small: it is kept
        const float off = large.centre ? x[j] - large.centre[j] : x[j], scale = large.scale ? large.scale[j] : 1.f;
        kept[count] = off;
        index[count] = static_cast<int32_t>(j);
        count += !(std::fabs(off) * scale <= large.threshold);
    }
    add(kernels, {weight, cols, index, kept, count}, bias, y, threads);
    return count;
}

void combine(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const int32_t* index, const float* factor, int64_t count, const float* bias, float* y, int threads) {
    const Rows job{weight, cols, index, factor, count};
    check_rows(job, rows);
    add(kernels, job, bias, y, threads);
}

void gather(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const int32_t* index, int64_t count, const float* x, Epilogue after, float* y, int threads) {
    const Rows job{weight, cols, index, nullptr, count};
    check_rows(job, rows);
    const int64_t parts = std::min<int64_t>(std::max(threads, 1), (count + 7) / 8);
    parallel(parts, threads, [&](int64_t part) {
        kernels.dot_rows(job, count * part / parts, count * (part + 1) / parts, x, after.bias, after.activation, y);
    });
}

}  // namespace secateur
