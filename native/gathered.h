// One vector times the part of a matrix that it chose, threaded: weights that were not chosen are not read.
#pragma once

#include "kernels.h"
#include "product.h"

namespace secateur {

// Which entries of a vector count: those with |x[j] - centre[j]| scale[j] above the threshold, as x[j] - centre[j]. Without the two
// pointers, both or none, those with |x[j]| above it.
struct Large {
    float threshold;
    const float* centre = nullptr;
    const float* scale = nullptr;
};

// y[c] = bias[c] + sum of the entries j of x that count times weight[j, c]. Returns how many they are.
int64_t thin(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const float* x, Large large, const float* bias, float* y, int threads);

// y[c] = bias[c] + sum over i of factor[i] weight[index[i], c]. Throws std::invalid_argument for an index outside of the rows.
void combine(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const int32_t* index, const float* factor, int64_t count, const float* bias, float* y, int threads);

// y[i] = activation(sum over c of weight[index[i], c] x[c] + bias[index[i]]). Throws as combine().
void gather(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const int32_t* index, int64_t count, const float* x, Epilogue after, float* y, int threads);

}  // namespace secateur
