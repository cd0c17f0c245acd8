// Activations into panels [column][lanes] and results out of them, for rows (transposed) and for runs of pixels (copied).
#pragma once

#include "activation.h"
#include "kernels.h"
#include "vec.h"

namespace secateur::SECATEUR_ISA {

// W rows x W columns of x, transposed into the panel; rows and columns past the end read as the last row and as zero.
SECATEUR_INLINE void pack_tile(const Input& in, int64_t lane, int64_t column, int columns, float* panel, int64_t P) {
    vec tile[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        const int64_t row = lane + i < in.lanes ? lane + i : in.lanes - 1;
        const float* p = in.x + row * in.row_stride + column;
        if (columns == W) {
            tile[i] = load(p);
        } else {
            float part[W] = {};
            for (int c = 0; c < columns; ++c) part[c] = p[c];
            tile[i] = load(part);
        }
    }
    transpose(tile);
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c)
        if (c < columns) store(panel + c * P, tile[c]);
}

inline void pack_rows(const Input& in, int64_t lane, int64_t column, int64_t columns, float* panel, int64_t P) {
    for (int64_t c = 0; c < columns; c += W) {
        const int width = columns - c < W ? static_cast<int>(columns - c) : W;
        if (width == W)
            for (int64_t v = 0; v < P; v += W) pack_tile(in, lane + v, column + c, W, panel + c * P + v, P);
        else
            for (int64_t v = 0; v < P; v += W) pack_tile(in, lane + v, column + c, width, panel + c * P + v, P);
    }
}

// Exactly `count` floats.
SECATEUR_INLINE void copy(const float* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load(from + i));
    if (i == count) return;
    if (i > 0)
        store(to + count - W, load(from + count - W));
    else
        for (; i < count; ++i) to[i] = from[i];
}

// The same run for every column, in whole vectors.
template <int N>
void copy_whole(const float* from, const int64_t* offset, int64_t columns, float* to, int64_t P) {
    for (int64_t k = 0; k < columns; ++k) {
        const float* p = from + offset[k];
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v) store(to + k * P + v * W, load(p + v * W));
    }
}

SECATEUR_INLINE void copy_run(const float* from, const int64_t* offset, int64_t columns, float* to, int64_t P, int64_t length, bool slack) {
    if (slack || length % W == 0) {
        switch ((length + W - 1) / W) {
            case 1: return copy_whole<1>(from, offset, columns, to, P);
            case 2: return copy_whole<2>(from, offset, columns, to, P);
            case 3: return copy_whole<3>(from, offset, columns, to, P);
            case 4: return copy_whole<4>(from, offset, columns, to, P);
            case 5: return copy_whole<5>(from, offset, columns, to, P);
            case 6: return copy_whole<6>(from, offset, columns, to, P);
            case 7: return copy_whole<7>(from, offset, columns, to, P);
            case 8: return copy_whole<8>(from, offset, columns, to, P);
            default: break;
        }
    }
    for (int64_t k = 0; k < columns; ++k) copy(from + offset[k], to + k * P, length);
}

inline void pack_runs(const Input& in, const int64_t* offset, int64_t lane, int64_t count, int64_t columns, float* panel,
                      int64_t P) {
    for (int64_t done = 0; done < count;) {
        const int64_t pixel = lane + done, run = pixel / in.run_length, inside = pixel % in.run_length;
        const int64_t rest = in.run_length - inside, length = rest < count - done ? rest : count - done;
        const bool slack = in.slack && done + (length + W - 1) / W * W <= P;  // what is written too far, the next run overwrites
        const float* from =
            in.x + run / in.runs_per_image * in.image_stride + run % in.runs_per_image * in.run_stride + inside;
        copy_run(from, offset, columns, panel + done, P, length, slack);
        done += length;
    }
    for (int64_t k = 0; k < columns; ++k)
        for (int64_t l = count; l < P; ++l) panel[k * P + l] = 0.f;
}

// Results [rows][lanes] of a chunk to y[lane][row], W x W at a time.
inline void unpack_rows(const Product& job, const float* results, int64_t lane, int64_t count, int64_t row, int64_t rows,
                        int64_t P) {
    for (int64_t r = 0; r < rows; r += W) {
        const int width = rows - r < W ? static_cast<int>(rows - r) : W;
        for (int64_t v = 0; v < count; v += W) {
            const int lanes = count - v < W ? static_cast<int>(count - v) : W;
            vec tile[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) tile[i] = i < width ? load(results + (r + i) * P + v) : vec{};
            if (job.activation != Activation::none)
                for (int i = 0; i < W; ++i) tile[i] = activate(tile[i], job.activation);
            transpose(tile);
            float* to = job.out.y + (lane + v) * job.out.row_stride + row + r;
            if (width == W && lanes == W) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) store(to + i * job.out.row_stride, tile[i]);
            } else {
                float part[W][W];
                for (int i = 0; i < W; ++i) store(part[i], tile[i]);
                for (int i = 0; i < lanes; ++i)
                    for (int c = 0; c < width; ++c) to[i * job.out.row_stride + c] = part[i][c];
            }
        }
    }
}

inline void unpack_runs(const Product& job, const float* results, int64_t lane, int64_t count, int64_t row, int64_t rows,
                        int64_t P) {
    const Output& out = job.out;
    for (int64_t done = 0; done < count;) {
        const int64_t image = (lane + done) / out.pixels, inside = (lane + done) % out.pixels;
        const int64_t rest = out.pixels - inside, length = rest < count - done ? rest : count - done;
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = results + r * P + done;
            float* to = out.y + image * out.image_stride + (row + r) * out.pixels + inside;
            if (job.activation == Activation::none) {
                copy(from, to, length);
                continue;
            }
            int64_t i = 0;
            for (; i + W <= length; i += W) store(to + i, activate(load(from + i), job.activation));
            if (i < length) {
                float part[W] = {};
                for (int64_t l = i; l < length; ++l) part[l - i] = from[l];
                store(part, activate(load(part), job.activation));
                for (int64_t l = i; l < length; ++l) to[l] = part[l - i];
            }
        }
        done += length;
    }
}

}  // namespace secateur::SECATEUR_ISA
