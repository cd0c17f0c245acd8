// Dense weights to packed ones and back. This is where bounds are checked: the kernels trust what pack() made.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "program.h"

namespace secateur {

struct Release {
    void operator()(char* data) const { std::free(data); }
};

struct Buffer {
    std::unique_ptr<char, Release> data;
    int64_t bytes = 0;
};

struct PackOptions {
    int32_t groups = 1, block_rows = 1, block_cols = 1;
    int32_t column_block = 0;  // 0: all columns
    int32_t chunk_rows = 0;    // 0: all rows of a group
};

// weight: [rows, cols] row-major, cols being those of one group. Throws std::invalid_argument where the shape does not fit.
Buffer pack(const float* weight, int64_t rows, int64_t cols, const PackOptions& options, int threads);
void unpack(const Program& program, float* weight);

Buffer pack_bits(const float* weight, int64_t rows, int64_t cols, ValueType type, int threads);
void unpack_bits(const Bits& bits, float* weight);

// The buffer seen as what it claims to be. Throws std::invalid_argument where its header does not fit the buffer, or the
// weight is not [rows, cols]; cols < 0 leaves the columns to the caller.
const Program& as_program(const void* data, int64_t bytes, int64_t rows, int64_t cols);
const Bits& as_bits(const void* data, int64_t bytes, int64_t rows, int64_t cols);

}  // namespace secateur
