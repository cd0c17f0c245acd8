// One or a few vectors times a bitmask matrix: memory-bound, so weights stay compressed until they are in a register.
//
// Each 64-bit mask word is W bits at a time: the kept values are loaded densely, spread to the lanes whose bit is set and
// multiplied by the matching lanes of x. The buffer ends in enough slack for a whole vector to be loaded anywhere.
#pragma once

#include "activation.h"
#include "kernels.h"
#include "vec.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace secateur::SECATEUR_ISA {

struct F32 {
    static SECATEUR_INLINE vec load_values(const char* base, int64_t at) {
        return load(reinterpret_cast<const float*>(base) + at);
    }
};

struct BF16 {
    static SECATEUR_INLINE vec load_values(const char* base, int64_t at) {
        using half = uint16_t __attribute__((vector_size(2 * W)));
        half raw;
        std::memcpy(&raw, base + at * 2, sizeof raw);
        const ivec wide = __builtin_convertvector(raw, ivec) << 16;
        vec out;
        std::memcpy(&out, &wide, sizeof out);
        return out;
    }
};

struct I8 {
    static SECATEUR_INLINE vec load_values(const char* base, int64_t at) {
        using byte = int8_t __attribute__((vector_size(W)));
        byte raw;
        std::memcpy(&raw, base + at, sizeof raw);
        return __builtin_convertvector(__builtin_convertvector(raw, ivec), vec);
    }
};

#if defined(__AVX512F__)
SECATEUR_INLINE vec spread(vec values, uint32_t bits) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), values);
}
#else
// For each byte of mask: for each lane, which of the packed values it takes, or -1 (bit 7) for none.
struct SpreadTable {
    alignas(64) int32_t lane[256][8];
    constexpr SpreadTable() : lane{} {
        for (int m = 0; m < 256; ++m)
            for (int l = 0, next = 0; l < 8; ++l) lane[m][l] = m >> l & 1 ? next++ : -1;
    }
};
inline constexpr SpreadTable kSpread{};

SECATEUR_INLINE vec spread(vec values, uint32_t bits) {
    ivec lane;
    std::memcpy(&lane, kSpread.lane[bits], sizeof lane);
#if defined(__AVX2__)
    const vec moved = _mm256_permutevar8x32_ps(values, reinterpret_cast<__m256i>(lane));
    return lane < 0 ? vec{} : moved;
#else
    float packed[W], out[W];
    store(packed, values);
    for (int l = 0; l < W; ++l) out[l] = lane[l] < 0 ? 0.f : packed[lane[l]];
    return load(out);
#endif
}
#endif

SECATEUR_INLINE float sum_lanes(vec v) {
    float lane[W], total = 0.f;
    store(lane, v);
    for (int step = W / 2; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
    total = lane[0];
    return total;
}

// B vectors at a time; x of each is padded to whole mask words by the caller.
template <class T, int B>
void matvec_rows(const MatVec& job, const float* x, int64_t row, int64_t rows) {
    constexpr int pieces = 64 / W, sums = 4;
    const Bits& weight = *job.weight;
    const char* values = weight.at<char>(weight.value_at);
    for (int64_t r = row; r < row + rows; ++r) {
        const uint64_t* mask = weight.mask() + r * weight.words;
        int64_t at = weight.start()[r];
        vec sum[B][sums];
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
            for (int s = 0; s < sums; ++s) sum[b][s] = vec{};
        for (int64_t word = 0; word < weight.words; ++word) {
            const uint64_t bits = mask[word];
            const float* xs = x + word * 64;
#pragma GCC unroll 16
            for (int p = 0; p < pieces; ++p) {
                const uint64_t below = p ? bits & ((uint64_t{1} << (p * W)) - 1) : 0;
                const uint32_t piece = static_cast<uint32_t>(bits >> (p * W)) & ((1u << W) - 1);
                const vec w = spread(T::load_values(values, at + __builtin_popcountll(below)), piece);
#pragma GCC unroll 16
                for (int b = 0; b < B; ++b) sum[b][p % sums] += w * load(xs + b * job.x_stride + p * W);
            }
            at += __builtin_popcountll(bits);
        }
        const float scale = weight.type == ValueType::int8 ? weight.scale()[r] : 1.f;
        const float bias = job.bias ? job.bias[r] : 0.f;
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) {
            const float total = sum_lanes((sum[b][0] + sum[b][1]) + (sum[b][2] + sum[b][3])) * scale + bias;
            vec one = activate(splat(total), job.activation);
            job.y[b * job.y_stride + r] = one[0];
        }
    }
}

template <class T>
void matvec_typed(const MatVec& job, int64_t row, int64_t rows) {
    MatVec part = job;
    int64_t left = job.vectors;
    for (; left >= 4; left -= 4, part.x += 4 * job.x_stride, part.y += 4 * job.y_stride) matvec_rows<T, 4>(part, part.x, row, rows);
    if (left & 2) matvec_rows<T, 2>(part, part.x, row, rows), part.x += 2 * job.x_stride, part.y += 2 * job.y_stride;
    if (left & 1) matvec_rows<T, 1>(part, part.x, row, rows);
}

inline void matvec(const MatVec& job, int64_t row, int64_t rows) {
    switch (job.weight->type) {
        case ValueType::float32: return matvec_typed<F32>(job, row, rows);
        case ValueType::bfloat16: return matvec_typed<BF16>(job, row, rows);
        case ValueType::int8: return matvec_typed<I8>(job, row, rows);
    }
}

}  // namespace secateur::SECATEUR_ISA
