// One or a few vectors times a bitmask matrix: memory-bound, so weights stay compressed until they are in a register.
//
// With AVX2 and AVX-512 a mask word is taken W bits at a time: the kept values are loaded densely, spread to the lanes whose
// bit is set and multiplied by those lanes of x; elsewhere bit by bit. The buffer ends in enough slack for a whole vector.
#pragma once

#include "activation.h"
#include "kernels.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace secateur::SECATEUR_ISA {

// How stored values become floats: a vector at a time, and one.
struct F32 {
    static constexpr int bytes = 4;
    static SECATEUR_INLINE float one(const char* p) { return *reinterpret_cast<const float*>(p); }
#if defined(__AVX2__)
    static SECATEUR_INLINE vec many(const char* p) { return load(reinterpret_cast<const float*>(p)); }
#endif
};

struct BF16 {
    static constexpr int bytes = 2;
    static SECATEUR_INLINE float one(const char* p) {
        const uint32_t bits = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p)) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
#if defined(__AVX512F__)
    static SECATEUR_INLINE vec many(const char* p) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
#elif defined(__AVX2__)
    static SECATEUR_INLINE vec many(const char* p) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
#endif
};

struct I8 {
    static constexpr int bytes = 1;
    static SECATEUR_INLINE float one(const char* p) { return *reinterpret_cast<const int8_t*>(p); }
#if defined(__AVX512F__)
    static SECATEUR_INLINE vec many(const char* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
#elif defined(__AVX2__)
    static SECATEUR_INLINE vec many(const char* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
#endif
};

// Values to the lanes whose bit is set, zero elsewhere. With AVX-512 in place and from a register: the processor waits for
// the old content of the destination even where all of it is overwritten, and expanding straight from memory is microcoded.
#if defined(__AVX512F__)
SECATEUR_INLINE vec spread(vec values, uint32_t bits) {
    asm("vexpandps %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(static_cast<__mmask16>(bits)));
    return values;
}
#elif defined(__AVX2__)
// For each byte of mask and each lane: which of the packed values it takes, or -1 for none.
struct SpreadTable {
    alignas(64) int8_t lane[256][8];
    constexpr SpreadTable() : lane{} {
        for (int m = 0; m < 256; ++m)
            for (int l = 0, next = 0; l < 8; ++l) lane[m][l] = static_cast<int8_t>(m >> l & 1 ? next++ : -1);
    }
};
constexpr SpreadTable kSpread{};

SECATEUR_INLINE vec spread(vec values, uint32_t bits) {
    const __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.lane[bits])));
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), _mm256_permutevar8x32_ps(values, lane));
}
#endif

// The products of one mask word with its values added to the sums. Returns where the next word's values start.
#if defined(__AVX2__)
constexpr int kSums = 4;
using sum_t = vec;

template <class T, int B>
SECATEUR_INLINE const char* add_word(const uint64_t* mask, const char* values, const float* x, int64_t stride, sum_t (&sum)[B][kSums]) {
#pragma GCC unroll 16
    for (int p = 0; p < 64 / W; ++p) {
        uint32_t bits = 0;
        std::memcpy(&bits, reinterpret_cast<const char*>(mask) + p * W / 8, W / 8);
        asm("" : "+r"(bits));  // or GCC counts in 16-bit registers, whose upper halves chain each count to the one before
        const vec w = spread(T::many(values), bits);
        values += static_cast<int64_t>(__builtin_popcount(bits)) * T::bytes;
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) sum[b][p % kSums] += w * load(x + b * stride + p * W);
    }
    return values;
}
#else
constexpr int kSums = 1;
using sum_t = float;

template <class T, int B>
SECATEUR_INLINE const char* add_word(const uint64_t* mask, const char* values, const float* x, int64_t stride, sum_t (&sum)[B][kSums]) {
    for (uint64_t bits = *mask; bits; bits &= bits - 1, values += T::bytes) {
        const float w = T::one(values);
        const float* column = x + __builtin_ctzll(bits);
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) sum[b][0] += w * column[b * stride];
    }
    return values;
}
#endif

SECATEUR_INLINE float total(float sum) { return sum; }
SECATEUR_INLINE float total(vec sum) {
    float lane[W];
    store(lane, sum);
    for (int step = W / 2; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
    return lane[0];
}

// B vectors at a time; x of each is padded to whole mask words by the caller.
template <class T, int B>
void matvec_rows(const MatVec& job, const float* x, int64_t row, int64_t rows) {
    const Bits& weight = *job.weight;
    for (int64_t r = row; r < row + rows; ++r) {
        const uint64_t* mask = weight.mask() + r * weight.words;
        const char* values = weight.at<char>(weight.value_at) + weight.start()[r] * T::bytes;
        sum_t sum[B][kSums];
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
            for (int s = 0; s < kSums; ++s) sum[b][s] = sum_t{};
        for (int64_t word = 0; word < weight.words; ++word)
            values = add_word<T, B>(mask + word, values, x + word * 64, job.x_stride, sum);
        const float scale = weight.type == ValueType::int8 ? weight.scale()[r] : 1.f;
        const float bias = job.bias ? job.bias[r] : 0.f;
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) {
            sum_t all = sum[b][0];
#pragma GCC unroll 16
            for (int s = 1; s < kSums; ++s) all += sum[b][s];
            job.y[b * job.y_stride + r] = activate(splat(total(all) * scale + bias), job.activation)[0];
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
