// One or a few vectors times a bitmask matrix: memory-bound, so weights stay compressed until they are in a register.
//
// With AVX2 and AVX-512 a mask word is taken W bits at a time: the kept values are loaded densely, spread to the lanes whose
// bit is set and multiplied by those lanes of x; elsewhere bit by bit. With the byte compression of AVX-512 VBMI2 and few bits
// set, it is x that moves: the places of the set bits are compressed into one register, and pick lanes of the 64 of x, which
// four registers hold. The buffer ends in enough slack for whole vectors.
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
constexpr int64_t kAhead = 6144;  // bytes of values fetched before they are needed: the processor's own prefetch stops at pages
using sum_t = vec;

template <class T, int B>
SECATEUR_INLINE const char* add_word(const uint64_t* mask, const char* values, const float* x, int64_t stride, sum_t (&sum)[B][kSums]) {
    __builtin_prefetch(values + kAhead);
    if constexpr (T::bytes == 4) __builtin_prefetch(values + kAhead + 64);
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

// As add_word, for words that need at most G vectors: branches and waits on no mask. Skipped columns are never multiplied.
#if defined(__AVX512VBMI2__)
constexpr bool kPicks = true;

template <int G>
SECATEUR_INLINE __m512i places(__m512i all) {
    if constexpr (G == 0)
        return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(all));
    else
        return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(all, G));
}

template <class T, int B, int Vectors, int G = 0>
SECATEUR_INLINE void add_picked(__m512i all, uint32_t kept, const char* values, const float* x, int64_t stride, int sums, sum_t (&sum)[B][kSums]) {
    const __m512i place = places<G>(all);
    const auto some = static_cast<__mmask16>(_bzhi_u64(0xffffffffffffffff, kept) >> (16 * G));
    const __mmask16 upper = _mm512_test_epi32_mask(place, _mm512_set1_epi32(32));
    const vec w = T::many(values + 16 * G * T::bytes);
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
        const float* p = x + b * stride;
        const vec low = _mm512_permutex2var_ps(load(p), place, load(p + W));
        const vec high = _mm512_permutex2var_ps(load(p + 2 * W), place, load(p + 3 * W));
        sum[b][sums + 2 * G] = _mm512_mask3_fmadd_ps(_mm512_mask_blend_ps(upper, low, high), w, sum[b][sums + 2 * G], some);
    }
    if constexpr (G + 1 < Vectors) add_picked<T, B, Vectors, G + 1>(all, kept, values, x, stride, sums, sum);
}

template <class T, int B, int Vectors>
SECATEUR_INLINE const char* pick_word(uint64_t bits, const char* values, const float* x, int64_t stride, int sums, sum_t (&sum)[B][kSums]) {
    alignas(64) static constexpr uint8_t kLanes[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                       22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
                                                       44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    __m512i all = _mm512_load_si512(kLanes);
    asm("vpcompressb %0, %0 %{%1%}%{z%}" : "+v"(all) : "Yk"(static_cast<__mmask64>(bits)));  // in place, as in spread()
    const auto kept = static_cast<uint32_t>(__builtin_popcountll(bits));
    __builtin_prefetch(values + kAhead);
    add_picked<T, B, Vectors>(all, kept, values, x, stride, sums, sum);
    return values + static_cast<int64_t>(kept) * T::bytes;
}

template <class T, int B, int Vectors>
SECATEUR_INLINE const char* pick_words(const uint64_t* mask, int64_t words, const char* values, const float* x, int64_t stride, sum_t (&sum)[B][kSums]) {
    int64_t word = 0;
    for (; word + 2 <= words; word += 2) {
        if (word % 8 == 0) __builtin_prefetch(mask + word + 512);
        values = pick_word<T, B, Vectors>(mask[word], values, x + word * 64, stride, 0, sum);
        values = pick_word<T, B, Vectors>(mask[word + 1], values, x + word * 64 + 64, stride, 1, sum);
    }
    if (word < words) values = pick_word<T, B, Vectors>(mask[word], values, x + word * 64, stride, 0, sum);
    return values;
}

// The values that their words had no room for, whose columns are listed.
template <class T, int B>
SECATEUR_INLINE void add_spilled(const int32_t* column, int64_t count, const char* values, const float* x, int64_t stride, sum_t (&sum)[B][kSums]) {
    for (int64_t i = 0; i < count; i += 16) {
        const auto some = static_cast<__mmask16>(_bzhi_u32(0xffff, count - i < 16 ? static_cast<uint32_t>(count - i) : 16));
        const __m512i place = _mm512_maskz_loadu_epi32(some, column + i);
        const vec w = T::many(values + i * T::bytes);
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) {
            const vec xs = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, place, x + b * stride, 4);
            sum[b][0] = _mm512_mask3_fmadd_ps(xs, w, sum[b][0], some);
        }
    }
}
#else
constexpr bool kPicks = false;

SECATEUR_INLINE void add_one(float& sum, float x) { sum += x; }
#if defined(__AVX2__)
SECATEUR_INLINE void add_one(vec& sum, float x) { sum[0] += x; }
#endif

template <class T, int B>
SECATEUR_INLINE void add_spilled(const int32_t* column, int64_t count, const char* values, const float* x, int64_t stride, sum_t (&sum)[B][kSums]) {
    float one[B] = {};
    for (int64_t i = 0; i < count; ++i) {
        const float w = T::one(values + i * T::bytes);
        for (int b = 0; b < B; ++b) one[b] += w * x[b * stride + column[i]];
    }
    for (int b = 0; b < B; ++b) add_one(sum[b][0], one[b]);
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

// B vectors at a time; x of each is padded to whole mask words by the caller. Vectors: as Bits::groups.
template <class T, int B, int Vectors>
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
        if constexpr (Vectors > 0)
            values = pick_words<T, B, Vectors>(mask, weight.words, values, x, job.x_stride, sum);
        else
            for (int64_t word = 0; word < weight.words; ++word)
                values = add_word<T, B>(mask + word, values, x + word * 64, job.x_stride, sum);
        if constexpr (Vectors > 0) __builtin_prefetch(weight.column() + weight.spill()[r] + 64);
        const int64_t spill = weight.spill()[r], spilled = weight.spill()[r + 1] - spill;
        if (spilled) add_spilled<T, B>(weight.column() + spill, spilled, values, x, job.x_stride, sum);
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

template <class T, int B>
void matvec_rows(const MatVec& job, const float* x, int64_t row, int64_t rows) {
    if constexpr (kPicks) {
        if (job.weight->groups == 1) return matvec_rows<T, B, 1>(job, x, row, rows);
        if (job.weight->groups == 2) return matvec_rows<T, B, 2>(job, x, row, rows);
    }
    matvec_rows<T, B, 0>(job, x, row, rows);
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
