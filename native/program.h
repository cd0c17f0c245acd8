// Packed sparse weights ("program"): one flat buffer of bytes, made and checked by pack(), then only read.
//
// Rows are cut into chunks, columns into column blocks; the nonzeros of one chunk and one column block are a segment.
// Inside a segment, rows are sorted by their number of nonzeros and equal ones form a run, so that the inner loop's trip
// count repeats and is predicted. Columns are 16-bit numbers counted from the start of the block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace secateur {

constexpr uint32_t kProgramMagic = 0x54434553;  // "SECT"
constexpr int kMaxLocal = 65535;                // largest 16-bit index: bounds rows of a chunk and columns of a block

struct Chunk {
    int32_t row, rows;   // in units of block_rows
    int32_t group;       // convolution group whose columns it reads
    int32_t reserved;
    int64_t nonzeros;    // blocks stored
};

struct Segment {
    int64_t value;       // first stored block
    int32_t run, runs;   // runs of rows with equally many blocks
    int32_t row;         // first entry in the row list
    int32_t reserved;
};

struct Run {
    uint16_t blocks, rows;
};

struct Program {
    uint32_t magic, reserved;
    int64_t bytes;                      // of the whole buffer
    int64_t rows, cols;                 // dense shape: all rows, columns of one group
    int32_t groups, block_rows, block_cols;
    int32_t column_block;               // columns of a segment, a multiple of block_cols
    int32_t chunks, column_blocks;
    int64_t nonzeros;                   // blocks stored
    int64_t chunk_at, segment_at, run_at, row_at, value_at, index_at;  // byte offsets of the sections

    template <class T>
    const T* at(int64_t offset) const {
        return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset);
    }
    const Chunk* chunk() const { return at<Chunk>(chunk_at); }
    const Segment* segment(int32_t chunk, int32_t block) const {
        return at<Segment>(segment_at) + static_cast<int64_t>(chunk) * column_blocks + block;
    }
    const Run* run() const { return at<Run>(run_at); }
    const uint16_t* row() const { return at<uint16_t>(row_at); }
    const float* value() const { return at<float>(value_at); }
    const uint16_t* index() const { return at<uint16_t>(index_at); }
};

// Weights of a matrix-vector product: one bit per position, and the kept values of each row one after another.
//
// Where few bits are set, a mask word is taken as a whole: its set bits name the lanes of x to multiply. `groups` bounds how
// many vectors of 16 values a word may need (0: no bound, 16 columns at a time are spread instead); what a word keeps beyond
// that is spilled: its columns are listed by number and its values stand at the end of the row. So no branch depends on a mask.
enum class ValueType : int32_t { float32 = 0, bfloat16 = 1, int8 = 2 };

constexpr uint32_t kBitsMagic = 0x42434553;  // "SECB"

struct Bits {
    uint32_t magic;
    ValueType type;
    int64_t bytes;
    int64_t rows, cols, words;  // words: 64-bit mask words of one row
    int64_t nonzeros;
    int64_t groups;             // vectors of 16 values a mask word may need, 0 without a bound
    int64_t mask_at, start_at, scale_at, spill_at, column_at, value_at;

    template <class T>
    const T* at(int64_t offset) const {
        return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset);
    }
    const uint64_t* mask() const { return at<uint64_t>(mask_at); }
    const int64_t* start() const { return at<int64_t>(start_at); }  // rows + 1
    const float* scale() const { return at<float>(scale_at); }      // one a row, int8 only
    const int64_t* spill() const { return at<int64_t>(spill_at); }  // rows + 1: where the spilled columns of a row start
    const int32_t* column() const { return at<int32_t>(column_at); }
};

}  // namespace secateur
