// Random shapes, sparsities, strides, blocks and threads against plain loops, for a build with AddressSanitizer: every
// buffer is an allocation of exactly its size, so that a read or write one float outside is caught.
//   fuzz [cases] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "dispatch.h"
#include "gathered.h"
#include "product.h"
#include "weights.h"

using namespace secateur;

namespace {

std::mt19937_64 random_bits;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
double chance() { return std::uniform_real_distribution<double>(0, 1)(random_bits); }

// malloc'ed to the byte, unlike std::vector, whose capacity may be larger than its size.
struct Floats {
    std::unique_ptr<float[]> data;
    int64_t size;
    explicit Floats(int64_t n, double density = 1.0) : data(new float[n]), size(n) {
        for (int64_t i = 0; i < n; ++i) data[i] = chance() < density ? static_cast<float>(chance() * 2 - 1) : 0.f;
    }
    float* get() const { return data.get(); }
};

const Kernels& any_kernels() {
    std::stringstream names(available_kernels());
    std::vector<std::string> all;
    for (std::string name; std::getline(names, name, ',');) all.push_back(name);
    return *find_kernels(all[pick(0, static_cast<int64_t>(all.size()) - 1)].c_str());
}

int64_t any_size(int64_t most) { return chance() < 0.05 ? 0 : chance() < 0.5 ? pick(1, 20) : pick(1, most); }

double activated(double x, Activation kind) {
    switch (kind) {
        case Activation::relu: return x < 0 ? 0 : x;
        case Activation::gelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::relu6: return std::min(std::max(x, 0.0), 6.0);
        default: return x;
    }
}

[[noreturn]] void fail(const char* what, const Kernels& k, int64_t at, double got, double expected) {
    std::printf("%s on %s: element %lld is %.9g, should be %.9g\n", what, k.name, static_cast<long long>(at), got, expected);
    std::exit(1);
}

void compare(const char* what, const Kernels& k, int64_t at, double got, double expected, double scale) {
    if (!(std::fabs(got - expected) <= 1e-5 * (1 + scale))) fail(what, k, at, got, expected);
}

void check_linear() {
    const Kernels& k = any_kernels();
    const int shape = static_cast<int>(pick(0, 2));
    PackOptions o;
    o.block_rows = shape == 1 ? 4 : 1, o.block_cols = shape == 2 ? 4 : 1;
    o.column_block = static_cast<int32_t>(pick(0, 1) ? pick(1, 200) : 0), o.chunk_rows = static_cast<int32_t>(pick(0, 1) ? pick(1, 64) : 0);
    const int64_t m = any_size(200), rows = any_size(50) * o.block_rows, cols = any_size(150) * o.block_cols;
    const int64_t stride = cols + pick(0, 3);
    const auto act = static_cast<Activation>(pick(0, 4));
    const int threads = static_cast<int>(pick(1, 5));
    Floats w(rows * cols, chance()), x(m ? (m - 1) * stride + cols : 0), b(rows), y(m * rows), z(m * rows), back(rows * cols);
    const bool biased = pick(0, 1);
    const Buffer packed = pack(w.get(), rows, cols, o, threads), bits = pack_bits(w.get(), rows, cols, ValueType::float32, threads);
    const Program& program = as_program(packed.data.get(), packed.bytes, rows, cols);
    unpack(program, back.get());
    for (int64_t i = 0; i < w.size; ++i)
        if (w.data[i] != back.data[i]) fail("unpack", k, i, back.data[i], w.data[i]);
    unpack_bits(as_bits(bits.data.get(), bits.bytes, rows, cols), back.get());
    for (int64_t i = 0; i < w.size; ++i)
        if (w.data[i] != back.data[i]) fail("unpack_bits", k, i, back.data[i], w.data[i]);
    linear(k, program, x.get(), m, stride, y.get(), {biased ? b.get() : nullptr, act}, threads);
    matvec(k, as_bits(bits.data.get(), bits.bytes, rows, cols), x.get(), m, stride, z.get(), {biased ? b.get() : nullptr, act}, threads);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = biased ? b.data[r] : 0, scale = 0;
            for (int64_t c = 0; c < cols; ++c) {
                const double term = static_cast<double>(w.data[r * cols + c]) * x.data[i * stride + c];
                sum += term, scale += std::fabs(term);
            }
            compare("linear", k, i * rows + r, y.data[i * rows + r], activated(sum, act), scale);
            compare("matvec", k, i * rows + r, z.data[i * rows + r], activated(sum, act), scale);
        }
}

// Rounded values are compared as they were rounded; skewed rows make some mask words spill.
void check_rounded() {
    const Kernels& k = any_kernels();
    const int64_t m = pick(0, 9), rows = any_size(30), cols = any_size(700);
    const auto type = static_cast<ValueType>(pick(0, 2));
    const int threads = static_cast<int>(pick(1, 5));
    Floats w(rows * cols, chance() / 2), x(m * cols), y(m * rows), rounded(rows * cols);
    if (rows && cols)
        for (int64_t i = pick(0, cols - 1), end = std::min(cols, i + pick(1, 80)); i < end; ++i) w.data[pick(0, rows - 1) * cols + i] = 0.5f;
    const Buffer packed = pack_bits(w.get(), rows, cols, type, threads);
    const Bits& bits = as_bits(packed.data.get(), packed.bytes, rows, cols);
    unpack_bits(bits, rounded.get());
    for (int64_t i = 0; i < w.size; ++i) compare("rounding", k, i, rounded.data[i], w.data[i], type == ValueType::float32 ? 0 : 1e3);
    matvec(k, bits, x.get(), m, cols, y.get(), {nullptr, Activation::none}, threads);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0, scale = 0;
            for (int64_t c = 0; c < cols; ++c) {
                const double term = static_cast<double>(rounded.data[r * cols + c]) * x.data[i * cols + c];
                sum += term, scale += std::fabs(term);
            }
            compare("matvec rounded", k, i * rows + r, y.data[i * rows + r], sum, scale);
        }
}

void check_conv() {
    const Kernels& k = any_kernels();
    const int64_t alone = pick(0, 3) == 0, groups = alone ? pick(1, 9) : pick(0, 2) ? 1 : pick(1, 3);
    const int64_t in = alone ? 1 : pick(1, 6), out = alone ? 1 : pick(1, 12);
    ConvShape s{pick(0, 3), groups * in, 0, 0, pick(1, 4), pick(1, 4), pick(1, 3), pick(1, 3), pick(0, 3), pick(0, 3), pick(1, 2), pick(1, 2)};
    s.end_h = pick(0, 3), s.end_w = pick(0, 3);
    s.height = std::max<int64_t>(1, s.dilation_h * (s.kernel_h - 1) + 1 - s.pad_h - s.end_h) + pick(0, 12);
    s.width = std::max<int64_t>(1, s.dilation_w * (s.kernel_w - 1) + 1 - s.pad_w - s.end_w) + pick(0, 40);
    if (pick(0, 3) == 0) s.kernel_h = s.kernel_w = s.stride_h = s.stride_w = 1, s.pad_h = s.pad_w = s.end_h = s.end_w = 0;
    PackOptions o;
    o.groups = static_cast<int32_t>(groups);
    o.column_block = static_cast<int32_t>(pick(0, 1) ? pick(1, 40) : 0), o.chunk_rows = static_cast<int32_t>(pick(0, 1) ? pick(1, 8) : 0);
    const int64_t rows = groups * out, cols = in * s.kernel_h * s.kernel_w, pixels = s.out_h() * s.out_w();
    const int threads = static_cast<int>(pick(1, 5));
    Floats w(rows * cols, chance()), x(s.images * s.channels * s.height * s.width), b(rows), y(s.images * rows * pixels);
    const Buffer packed = pack(w.get(), rows, cols, o, threads);
    if (in == 1 && out == 1)
        depthwise(k, w.get(), x.get(), s, y.get(), {b.get(), Activation::none}, threads);
    else
        conv2d(k, as_program(packed.data.get(), packed.bytes, rows, cols), x.get(), s, y.get(), {b.get(), Activation::none}, threads);
    for (int64_t n = 0; n < s.images; ++n)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t p = 0; p < pixels; ++p) {
                double sum = b.data[r];
                for (int64_t c = 0; c < cols; ++c) {
                    const int64_t channel = r / out * in + c / (s.kernel_h * s.kernel_w), tap = c % (s.kernel_h * s.kernel_w);
                    const int64_t yy = p / s.out_w() * s.stride_h - s.pad_h + tap / s.kernel_w * s.dilation_h;
                    const int64_t xx = p % s.out_w() * s.stride_w - s.pad_w + tap % s.kernel_w * s.dilation_w;
                    if (yy >= 0 && yy < s.height && xx >= 0 && xx < s.width)
                        sum += static_cast<double>(w.data[r * cols + c]) * x.data[((n * s.channels + channel) * s.height + yy) * s.width + xx];
                }
                compare("conv2d", k, (n * rows + r) * pixels + p, y.data[(n * rows + r) * pixels + p], sum, static_cast<double>(cols));
            }
}

// Chosen rows, some of them more than once; sizes that are no multiple of a vector; nothing chosen at all.
void check_gathered() {
    const Kernels& k = any_kernels();
    const int64_t rows = pick(1, 150), cols = any_size(300), count = pick(0, 3) ? pick(0, 200) : 0;
    const int threads = static_cast<int>(pick(1, 5));
    const bool biased = pick(0, 1);
    Floats w(rows * cols), x(cols), z(rows, chance()), columns(cols), of_rows(rows), dots(count), sums(cols), thinned(cols), factor(count);
    const std::unique_ptr<int32_t[]> index(new int32_t[count]);
    for (int64_t i = 0; i < count; ++i) index[i] = static_cast<int32_t>(pick(0, rows - 1));
    const auto act = static_cast<Activation>(pick(0, 4));
    const auto threshold = static_cast<float>(pick(0, 3) ? chance() : 2);
    gather(k, w.get(), rows, cols, index.get(), count, x.get(), {biased ? of_rows.get() : nullptr, act}, dots.get(), threads);
    combine(k, w.get(), rows, cols, index.get(), factor.get(), count, biased ? columns.get() : nullptr, sums.get(), threads);
    Floats centre(rows), scale(rows);
    const bool around = pick(0, 1);
    const Large large_ones{threshold, around ? centre.get() : nullptr, around ? scale.get() : nullptr};
    thin(k, w.get(), rows, cols, z.get(), large_ones, biased ? columns.get() : nullptr, thinned.get(), threads);
    for (int64_t i = 0; i < count; ++i) {
        double sum = biased ? of_rows.data[index[i]] : 0;
        for (int64_t c = 0; c < cols; ++c) sum += static_cast<double>(w.data[index[i] * cols + c]) * x.data[c];
        compare("gather", k, i, dots.data[i], activated(sum, act), static_cast<double>(cols));
    }
    for (int64_t c = 0; c < cols; ++c) {
        double some = biased ? columns.data[c] : 0, large = some;
        for (int64_t i = 0; i < count; ++i) some += static_cast<double>(w.data[index[i] * cols + c]) * factor.data[i];
        for (int64_t r = 0; r < rows; ++r) {
            const float off = around ? z.data[r] - centre.data[r] : z.data[r];
            if (std::fabs(off) * (around ? scale.data[r] : 1.f) > threshold) large += static_cast<double>(w.data[r * cols + c]) * off;
        }
        compare("combine", k, c, sums.data[c], some, static_cast<double>(count));
        compare("thin", k, c, thinned.data[c], large, static_cast<double>(rows));
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000;
    random_bits.seed(argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 0);
    void (*const checks[])() = {check_linear, check_conv, check_rounded, check_gathered};
    for (int64_t i = 0; i < cases; ++i) checks[pick(0, 3)]();
    std::printf("%lld cases on %s\n", static_cast<long long>(cases), available_kernels());
}
