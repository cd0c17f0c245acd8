// Activations applied to whole vectors while results are still in cache. Absolute error below 4e-7 for |x| of order one.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace secateur::SECATEUR_ISA {

// exp(x) after Cephes: x = n ln2 + r, a polynomial of degree 6 in r, and n added to the exponent bits.
SECATEUR_INLINE vec exp(vec x) {
    x = x > 88.f ? splat(88.f) : x;
    x = x < -87.f ? splat(-87.f) : x;
    const vec shifted = x * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23: the integer ends up in the low bits
    const vec n = shifted - 12582912.f;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;
    vec scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// x/2 (1 + erf(x / sqrt 2)) by erfc of Abramowitz and Stegun 7.1.26, which loses nothing where the result is near zero.
SECATEUR_INLINE vec gelu(vec x) {
    const vec a = (x < 0.f ? -x : x) * 0.70710678118654752f;
    const vec t = 1.f / (a * 0.3275911f + 1.f);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec half = x * 0.5f * (p * t * exp(-a * a));
    return x < 0.f ? half : x - half;
}

SECATEUR_INLINE vec activate(vec x, Activation kind) {
    switch (kind) {
        case Activation::relu: return x < 0.f ? vec{} : x;
        case Activation::relu6: return x < 0.f ? vec{} : x > 6.f ? splat(6.f) : x;
        case Activation::gelu: return gelu(x);
        case Activation::silu: return x / (exp(-x) + 1.f);
        default: return x;
    }
}

}  // namespace secateur::SECATEUR_ISA
