// One vector times the part of a matrix that it chose, threaded: weights that were not chosen are not read.
#pragma once

#include "kernels.h"
#include "product.h"

namespace secateur {

// y[c] = bias[c] + sum of x[j] weight[j, c] over the rows j whose |x[j]| is above the threshold. Returns how many those are.
int64_t thin(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const float* x, float threshold, const float* bias, float* y, int threads);

// y[c] = bias[c] + sum over i of factor[i] weight[index[i], c]. Throws std::invalid_argument for an index outside of the rows.
void combine(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const int32_t* index, const float* factor, int64_t count, const float* bias, float* y, int threads);

// y[i] = activation(sum over c of weight[index[i], c] x[c] + bias[index[i]]). Throws as combine().
void gather(const Kernels& kernels, const float* weight, int64_t rows, int64_t cols, const int32_t* index, int64_t count, const float* x, Epilogue after, float* y, int threads);

}  // namespace secateur
