// A vector of SECATEUR_WIDTH floats by the compiler's own vector extensions, so that one source serves SSE, AVX2,
// AVX-512 and NEON. Everything lives in a namespace of its own per instruction set: the linker must never hand a
// function compiled for one set to another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define SECATEUR_INLINE __attribute__((always_inline)) inline

namespace secateur::SECATEUR_ISA {

constexpr int W = SECATEUR_WIDTH;
using vec = float __attribute__((vector_size(4 * W)));
using ivec = int32_t __attribute__((vector_size(4 * W)));
using loose_vec = float __attribute__((vector_size(4 * W), aligned(4), may_alias));

SECATEUR_INLINE vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
SECATEUR_INLINE void store(float* p, vec v) { *reinterpret_cast<loose_vec*>(p) = v; }
SECATEUR_INLINE vec splat(float x) { return vec{} + x; }

// Two rows of a W x W transposition exchange the off-diagonal blocks of size S.
template <int S, bool Upper, int... L>
SECATEUR_INLINE vec exchange(vec a, vec b, std::integer_sequence<int, L...>) {
    if constexpr (Upper)
        return __builtin_shufflevector(a, b, (L & S ? W + L - S : L)...);
    else
        return __builtin_shufflevector(a, b, (L & S ? W + L : L + S)...);
}

template <int S>
SECATEUR_INLINE void transpose_step(vec (&r)[W]) {
    using lanes = std::make_integer_sequence<int, W>;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if (i & S) continue;
        vec a = r[i], b = r[i + S];
        r[i] = exchange<S, true>(a, b, lanes{});
        r[i + S] = exchange<S, false>(a, b, lanes{});
    }
}

// Transpose a W x W tile held in registers: log2(W) steps of W two-operand shuffles.
SECATEUR_INLINE void transpose(vec (&r)[W]) {
    if constexpr (W > 8) transpose_step<8>(r);
    if constexpr (W > 4) transpose_step<4>(r);
    transpose_step<2>(r);
    transpose_step<1>(r);
}

}  // namespace secateur::SECATEUR_ISA
