// The three operations, threaded: linear layers, two-dimensional convolutions, and a few vectors at a time.
#pragma once

#include "kernels.h"

namespace secateur {

struct Epilogue {
    const float* bias;  // one an output feature, or null
    Activation activation;
};

// y[m, r] = activation(sum_k x[m, k] W[r, k] + bias[r]); x has `stride` floats from row to row, y is dense.
void linear(const Kernels& kernels, const Program& weight, const float* x, int64_t m, int64_t stride, float* y, Epilogue after, int threads);

struct ConvShape {
    int64_t images, channels, height, width;  // of the input
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int64_t end_h, end_w;  // padding below and to the right; pad_h and pad_w are above and to the left
    int64_t out_h() const { return (height + pad_h + end_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
    int64_t out_w() const { return (width + pad_w + end_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
};

// x: [images, channels, height, width], y: [images, rows, out_h, out_w], both dense; zero padding.
void conv2d(const Kernels& kernels, const Program& weight, const float* x, const ConvShape& shape, float* y, Epilogue after, int threads);

// A kernel of its own, weight [channels, kernel_h, kernel_w], for every channel of x; y: [images, channels, out_h, out_w].
void depthwise(const Kernels& kernels, const float* weight, const float* x, const ConvShape& shape, float* y, Epilogue after, int threads);

// As linear(), for a few rows: the weight is read once for every four of them.
void matvec(const Kernels& kernels, const Bits& weight, const float* x, int64_t m, int64_t stride, float* y, Epilogue after, int threads);

}  // namespace secateur
