#include "product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace secateur {

namespace {

// Lanes into panels, chunks of rows into `splits` parts of equal nonzeros, so that every thread has as much to do.
std::vector<Unit> divide(const Kernels& kernels, const Product& job, int threads) {
    const Program& weight = *job.weight;
    const int64_t vectors = (job.in.lanes + kernels.width - 1) / kernels.width;
    int64_t panels = (vectors + kernels.most_vectors(weight) - 1) / kernels.most_vectors(weight);
    if (panels * weight.chunks < threads) panels = std::min<int64_t>(vectors, threads);
    int64_t splits = 1;
    const auto idle = [&](int64_t s) {  // share of the threads' time that the last round leaves unused
        const int64_t units = panels * s, rounds = (units + threads - 1) / threads;
        return 1.0 - static_cast<double>(units) / static_cast<double>(rounds * threads);
    };
    while (splits < std::min(weight.chunks, 8) && idle(splits) > 0.1) ++splits;
    if (idle(splits) > 0.1) splits = std::min<int64_t>(weight.chunks, threads);

    std::vector<int32_t> bound(splits + 1, weight.chunks);
    bound[0] = 0;
    int64_t seen = 0;
    for (int32_t c = 0, s = 1; c < weight.chunks && s < splits; ++c) {
        seen += weight.chunk()[c].nonzeros;
        while (s < splits && seen * splits >= weight.nonzeros * s) bound[s++] = c + 1;
    }
    std::vector<Unit> units;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = vectors * p / panels * kernels.width, last = vectors * (p + 1) / panels * kernels.width;
        for (int64_t s = 0; s < splits; ++s)
            if (bound[s] < bound[s + 1]) units.push_back({first, std::min(last, job.in.lanes) - first, bound[s], bound[s + 1]});
    }
    return units;
}

void run(const Kernels& kernels, const Product& job, int threads) {
    if (job.in.lanes == 0 || job.weight->rows == 0) return;
    const std::vector<Unit> units = divide(kernels, job, threads);
    int64_t widest = 0;
    for (const Unit& unit : units) widest = std::max(widest, unit.count);
    const int64_t floats = kernels.scratch_floats(job, widest);
    parallel(static_cast<int64_t>(units.size()), threads,
             [&](int64_t i) { kernels.product(job, units[i], scratch(Scratch::panel, floats)); });
}

// One channel with its zero border, split by the stride: positions whose row and column leave the same remainders lie
// together, so that the pixels a kernel tap meets along an output row are contiguous whatever the stride.
struct Planes {
    int64_t height, width, size;
    explicit Planes(const ConvShape& s)
        : height((s.height + s.pad_h + s.end_h + s.stride_h - 1) / s.stride_h),
          width((s.width + s.pad_w + s.end_w + s.stride_w - 1) / s.stride_w),
          size(s.stride_h * s.stride_w * height * width) {}

    void fill(const ConvShape& s, const float* image, float* to) const {
        std::memset(to, 0, size * sizeof(float));
        for (int64_t y = 0; y < s.height; ++y) {
            const int64_t row = y + s.pad_h;
            float* line = to + (row % s.stride_h * s.stride_w * height + row / s.stride_h) * width;
            const float* from = image + y * s.width;
            if (s.stride_w == 1) {
                std::memcpy(line + s.pad_w, from, s.width * sizeof(float));
                continue;
            }
            for (int64_t phase = 0; phase < s.stride_w; ++phase) {
                const int64_t first = ((phase - s.pad_w) % s.stride_w + s.stride_w) % s.stride_w;
                const int64_t count = (s.width - first + s.stride_w - 1) / s.stride_w;
                float* split = line + phase * height * width + (first + s.pad_w) / s.stride_w;
                if (s.stride_w == 2)  // a constant stride is vectorised
                    for (int64_t i = 0; i < count; ++i) split[i] = from[first + 2 * i];
                else
                    for (int64_t i = 0; i < count; ++i) split[i] = from[first + s.stride_w * i];
            }
        }
    }

    int64_t offset(const ConvShape& s, int64_t tap_y, int64_t tap_x) const {
        const int64_t y = tap_y * s.dilation_h, x = tap_x * s.dilation_w;
        return (y % s.stride_h * s.stride_w + x % s.stride_w) * height * width + y / s.stride_h * width + x / s.stride_w;
    }
};

bool is_pointwise(const ConvShape& s) {
    return s.kernel_h * s.kernel_w == 1 && s.stride_h * s.stride_w == 1 && s.pad_h + s.pad_w + s.end_h + s.end_w == 0;
}

}  // namespace

void linear(const Kernels& kernels, const Program& weight, const float* x, int64_t m, int64_t stride, float* y, Epilogue after, int threads) {
    Product job{&weight, {}, {}, after.bias, after.activation};
    job.in.x = x, job.in.lanes = m, job.in.rows = true, job.in.row_stride = stride;
    job.out.y = y, job.out.row_stride = weight.rows;
    run(kernels, job, threads);
}

void conv2d(const Kernels& kernels, const Program& weight, const float* x, const ConvShape& s, float* y, Epilogue after, int threads) {
    const int64_t pixels = s.out_h() * s.out_w(), taps = s.kernel_h * s.kernel_w;
    if (pixels <= 0 || s.images == 0) return;
    Product job{&weight, {}, {}, after.bias, after.activation};
    job.out.pixels = pixels, job.out.image_stride = weight.rows * pixels;
    std::vector<int64_t> offset(s.channels * taps);
    job.in.offset = offset.data();
    if (is_pointwise(s)) {
        for (int64_t c = 0; c < s.channels; ++c) offset[c] = c * pixels;
        job.in.x = x, job.in.lanes = s.images * pixels;
        job.in.run_length = pixels, job.in.runs_per_image = 1, job.in.image_stride = s.channels * pixels;
        job.out.y = y;
        return run(kernels, job, threads);
    }
    const Planes planes(s);
    for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t t = 0; t < taps; ++t) offset[c * taps + t] = c * planes.size + planes.offset(s, t / s.kernel_w, t % s.kernel_w);
    job.in.run_length = s.out_w(), job.in.runs_per_image = s.out_h(), job.in.run_stride = planes.width;
    job.in.image_stride = s.channels * planes.size, job.in.slack = true;
    // Small images go together to fill panels; large ones one after another to stay in cache.
    const int64_t at_once = std::clamp<int64_t>(2048 * threads / pixels, 1, s.images);
    float* padded = scratch(Scratch::input, at_once * s.channels * planes.size + 64);
    for (int64_t first = 0; first < s.images; first += at_once) {
        const int64_t images = std::min(at_once, s.images - first);
        const float* from = x + first * s.channels * s.height * s.width;
        parallel(images * s.channels, threads, [&](int64_t i) { planes.fill(s, from + i * s.height * s.width, padded + i * planes.size); });
        job.in.x = padded, job.in.lanes = images * pixels;
        job.out.y = y + first * job.out.image_stride;
        run(kernels, job, threads);
    }
}

void depthwise(const Kernels& kernels, const float* weight, const float* x, const ConvShape& s, float* y, Epilogue after, int threads) {
    const int64_t pixels = s.out_h() * s.out_w(), taps = s.kernel_h * s.kernel_w, all = s.images * s.channels;
    if (pixels <= 0 || all == 0) return;
    const Planes planes(s);
    std::vector<int64_t> offset(taps);
    for (int64_t t = 0; t < taps; ++t) offset[t] = planes.offset(s, t / s.kernel_w, t % s.kernel_w);
    const int64_t sums = planes.height * planes.width + kDepthwiseSlack, together = std::max<int64_t>(1, 4096 / planes.size);
    parallel((all + together - 1) / together, threads, [&](int64_t unit) {
        float* scratch_sums = scratch(Scratch::panel, sums);
        float* plane = scratch(Scratch::input, planes.size + kDepthwiseSlack);
        std::memset(plane + planes.size, 0, kDepthwiseSlack * sizeof(float));
        for (int64_t i = unit * together; i < std::min(all, (unit + 1) * together); ++i) {
            const int64_t c = i % s.channels;
            planes.fill(s, x + i * s.height * s.width, plane);
            kernels.depthwise({weight + c * taps, plane, offset.data(), taps, planes.width, s.out_h(), s.out_w(),
                               after.bias ? after.bias[c] : 0.f, after.activation, scratch_sums, y + i * pixels});
        }
    });
}

void matvec(const Kernels& kernels, const Bits& weight, const float* x, int64_t m, int64_t stride, float* y, Epilogue after, int threads) {
    if (m == 0 || weight.rows == 0) return;
    MatVec job{&weight, x, y, m, stride, weight.rows, after.bias, after.activation};
    if (weight.cols % 64) {  // whole mask words are read, so rows of x are given a border of zeros
        job.x_stride = weight.words * 64;
        float* padded = scratch(Scratch::input, m * job.x_stride);
        for (int64_t i = 0; i < m; ++i) {
            std::copy_n(x + i * stride, weight.cols, padded + i * job.x_stride);
            std::fill(padded + i * job.x_stride + weight.cols, padded + (i + 1) * job.x_stride, 0.f);
        }
        job.x = padded;
    }
    const int64_t parts = threads <= 1 ? 1 : std::min<int64_t>(weight.rows, 4 * threads);
    const int64_t* start = weight.start();
    // A row costs its nonzeros and its mask words: equal shares of both.
    const auto cost = [&](int64_t r) { return start[r] + r * weight.words * 2; };
    std::vector<int64_t> bound(parts + 1, weight.rows);
    bound[0] = 0;
    for (int64_t p = 1, r = 0; p < parts; ++p) {
        while (r < weight.rows && cost(r) * parts < cost(weight.rows) * p) ++r;
        bound[p] = r;
    }
    parallel(parts, threads, [&](int64_t p) {
        if (bound[p] < bound[p + 1]) kernels.matvec(job, bound[p], bound[p + 1] - bound[p]);
    });
}

}  // namespace secateur
