// Compiled once for each instruction set, with SECATEUR_ISA, SECATEUR_WIDTH and the compiler's own flags set by CMake.
#include "kernels.h"

#include "depthwise.h"
#include "matvec.h"
#include "pack.h"
#include "panel.h"
#include "rows.h"

namespace secateur::SECATEUR_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Vectors in a panel: as many running sums as fit the registers beside the operands.
constexpr int vectors_for(int block_rows) { return block_rows == 1 ? 8 : kRegisters == 32 ? 4 : 2; }

int most_vectors(const Program& weight) { return vectors_for(weight.block_rows); }

int64_t panel_floats(const Program& weight, int64_t P) { return weight.cols * P + 64; }

int64_t scratch_floats(const Product& job, int64_t lanes) {
    const Program& weight = *job.weight;
    const int64_t P = (lanes + W - 1) / W * W;
    int64_t rows = 0;
    for (int32_t c = 0; c < weight.chunks; ++c) rows = weight.chunk()[c].rows > rows ? weight.chunk()[c].rows : rows;
    return panel_floats(weight, P) + rows * weight.block_rows * P + 64;
}

template <int V, int BR, int BC>
void panel(const Product& job, const Unit& unit, float* scratch) {
    constexpr int64_t P = V * W;
    const Program& weight = *job.weight;
    float* results = scratch + panel_floats(weight, P);
    int32_t packed = -1;  // group whose columns the panel holds
    for (int32_t c = unit.first; c < unit.last; ++c) {
        const Chunk& chunk = weight.chunk()[c];
        const int64_t row = static_cast<int64_t>(chunk.row) * BR, rows = static_cast<int64_t>(chunk.rows) * BR;
        const float* bias = job.bias ? job.bias + row : nullptr;
        for (int32_t b = 0; b < weight.column_blocks; ++b) {
            const int64_t column = static_cast<int64_t>(b) * weight.column_block, rest = weight.cols - column;
            const int64_t columns = rest < weight.column_block ? rest : weight.column_block;
            float* x = scratch + column * P;
            if (packed != chunk.group) {
                if (job.in.rows)
                    pack_rows(job.in, unit.lane, column, columns, x, P);
                else
                    pack_runs(job.in, job.in.offset + chunk.group * weight.cols + column, unit.lane, unit.count, columns, x, P);
            }
            const Segment& segment = *weight.segment(c, b);
            if (b == 0)
                multiply_segment<V, BR, BC, true>(weight, segment, x, bias, results);
            else
                multiply_segment<V, BR, BC, false>(weight, segment, x, bias, results);
        }
        packed = chunk.group;
        if (job.in.rows)
            unpack_rows(job, results, unit.lane, unit.count, row, rows, P);
        else
            unpack_runs(job, results, unit.lane, unit.count, row, rows, P);
    }
}

template <int BR, int BC>
void product_of(const Product& job, const Unit& unit, float* scratch) {
    switch ((unit.count + W - 1) / W) {
        case 1: return panel<1, BR, BC>(job, unit, scratch);
        case 2: return panel<2, BR, BC>(job, unit, scratch);
        default: break;
    }
    if constexpr (vectors_for(BR) >= 4) {
        switch ((unit.count + W - 1) / W) {
            case 3: return panel<3, BR, BC>(job, unit, scratch);
            case 4: return panel<4, BR, BC>(job, unit, scratch);
            default: break;
        }
    }
    if constexpr (vectors_for(BR) >= 8) {
        switch ((unit.count + W - 1) / W) {
            case 5: return panel<5, BR, BC>(job, unit, scratch);
            case 6: return panel<6, BR, BC>(job, unit, scratch);
            case 7: return panel<7, BR, BC>(job, unit, scratch);
            case 8: return panel<8, BR, BC>(job, unit, scratch);
            default: break;
        }
    }
    __builtin_trap();
}

void product(const Product& job, const Unit& unit, float* scratch) {
    const Program& weight = *job.weight;
    if (weight.block_rows == 4) return product_of<4, 1>(job, unit, scratch);
    if (weight.block_cols == 4) return product_of<1, 4>(job, unit, scratch);
    return product_of<1, 1>(job, unit, scratch);
}

#define SECATEUR_TEXT_(x) #x
#define SECATEUR_TEXT(x) SECATEUR_TEXT_(x)
constexpr Kernels table = {SECATEUR_TEXT(SECATEUR_ISA), W, scratch_floats, most_vectors, product, matvec, depthwise, add_rows, dot_rows};

}  // namespace

const Kernels* kernels() { return &table; }

}  // namespace secateur::SECATEUR_ISA
