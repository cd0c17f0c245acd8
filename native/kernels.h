// What the instruction-set variants offer, and the arguments they share. No templates of the standard library here.
#pragma once

#include <cstdint>

#include "program.h"

namespace secateur {

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, silu = 3, relu6 = 4 };

// Where activations lie. Linear: lane l is row l, column k is x[l * row_stride + k].
// Runs (convolution): lanes are output pixels; pixel p lies in run p / run_length, whose pixels are contiguous for every
// column: x[offset[k] + (run / runs_per_image) * image_stride + (run % runs_per_image) * run_stride + p % run_length].
struct Input {
    const float* x;
    int64_t lanes;
    bool rows;
    int64_t row_stride;
    const int64_t* offset;        // [groups * cols]
    int64_t run_length, runs_per_image, run_stride, image_stride;
    bool slack;                   // the last vector of a run may be read whole
};

// Where results go. Linear: y[l * row_stride + row]. Runs: y[(p / pixels) * image_stride + row * pixels + p % pixels].
struct Output {
    float* y;
    int64_t row_stride;
    int64_t pixels, image_stride;
};

struct Product {
    const Program* weight;
    Input in;
    Output out;
    const float* bias;  // one a row, or null
    Activation activation;
};

// One unit of work: lanes [lane, lane + count) of chunks [first, last). The scratch is reused from unit to unit.
struct Unit {
    int64_t lane, count;
    int32_t first, last;
};

struct MatVec {
    const Bits* weight;
    const float* x;
    float* y;
    int64_t vectors, x_stride, y_stride;
    const float* bias;
    Activation activation;
};

// One channel of a depthwise convolution over its padded plane, whose rows are `width` apart: tap t of output (r, c) is
// plane[offset[t] + r * width + c]. The plane may be read, and the sums written, one block of vectors too far.
struct Depthwise {
    const float *weight, *plane;
    const int64_t* offset;
    int64_t taps, width, out_h, out_w;
    float bias;
    Activation activation;
    float *sums, *y;
};

// Rows of weight[.., cols] by their numbers, with one factor each where they are added up.
struct Rows {
    const float* weight;
    int64_t cols;
    const int32_t* index;
    const float* factor;
    int64_t count;
};

constexpr int64_t kDepthwiseSlack = 128;  // floats

struct Kernels {
    const char* name;
    int width;                    // floats in a vector
    int64_t (*scratch_floats)(const Product&, int64_t lanes);
    int (*most_vectors)(const Program&);
    void (*product)(const Product&, const Unit&, float* scratch);
    void (*matvec)(const MatVec&, int64_t row, int64_t rows);
    void (*depthwise)(const Depthwise&);
    void (*add_rows)(const Rows&, int64_t first, int64_t last, float* y);  // to columns [first, last) of y
    void (*dot_rows)(const Rows&, int64_t first, int64_t last, const float* x, const float* bias, Activation, float* y);
};

}  // namespace secateur
