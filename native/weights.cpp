#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace secateur {

namespace {

constexpr int64_t kSlack = 256;  // bytes behind the last value that a whole vector may read

// To the byte where it is small, so that a sanitizer sees every access outside; large weights on large pages where the system
// gives them, as streaming through them is a tenth faster so.
Buffer allocate(int64_t bytes) {
    constexpr int64_t kPage = 2 << 20;
    if (bytes < kPage) {
        Buffer out{std::unique_ptr<char, Release>(static_cast<char*>(std::aligned_alloc(64, bytes))), bytes};
        if (!out.data) throw std::bad_alloc();
        return out;
    }
    const int64_t whole = (bytes + kPage - 1) / kPage * kPage;
    Buffer out{std::unique_ptr<char, Release>(static_cast<char*>(std::aligned_alloc(kPage, whole))), bytes};
    if (!out.data) throw std::bad_alloc();
#if defined(__linux__)
    madvise(out.data.get(), whole, MADV_HUGEPAGE);
#endif
    return out;
}

struct Layout {
    int64_t end;
    int64_t add(int64_t bytes) {
        const int64_t at = end;
        end += (bytes + 63) / 64 * 64;
        return at;
    }
};

bool block_is_zero(const float* block, int64_t cols, int32_t block_rows, int32_t block_cols) {
    for (int32_t r = 0; r < block_rows; ++r)
        for (int32_t c = 0; c < block_cols; ++c)
            if (block[r * cols + c] != 0.f) return false;
    return true;
}

void check(int64_t rows, int64_t cols, const PackOptions& o) {
    const auto refuse = [](const std::string& why) { throw std::invalid_argument(why); };
    if (rows < 0 || cols < 0) refuse("a weight has no negative size");
    if (o.groups < 1 || rows % o.groups) refuse(std::to_string(rows) + " rows do not divide into " + std::to_string(o.groups) + " groups");
    const bool known = (o.block_rows == 1 || o.block_rows == 4) && (o.block_cols == 1 || o.block_cols == 4);
    if (!known || o.block_rows * o.block_cols == 16) refuse("blocks are 1x1, 4x1 or 1x4");
    if (rows / o.groups % o.block_rows || cols % o.block_cols)
        refuse("a weight of " + std::to_string(rows) + " rows in " + std::to_string(o.groups) + " groups and " + std::to_string(cols) +
               " columns does not divide into blocks of " + std::to_string(o.block_rows) + "x" + std::to_string(o.block_cols));
    if (o.column_block < 0 || o.chunk_rows < 0) refuse("block sizes are positive");
}

// The weight as chunks of rows and blocks of columns, before anything is stored.
struct Plan {
    const float* weight;
    int64_t rows, cols;
    PackOptions o;
    int64_t block_rows_total, column_blocks;
    std::vector<Chunk> chunks;
    std::vector<uint16_t> count;  // [block rows, column blocks]

    Plan(const float* w, int64_t rows, int64_t cols, const PackOptions& options) : weight(w), rows(rows), cols(cols), o(options) {
        const int64_t most = static_cast<int64_t>(kMaxLocal) * o.block_cols;
        int64_t wide = o.column_block ? std::min<int64_t>(o.column_block, cols) : cols;
        wide = std::clamp<int64_t>(wide, o.block_cols, most) / o.block_cols * o.block_cols;
        o.column_block = static_cast<int32_t>(wide);
        column_blocks = std::max<int64_t>(1, (cols + wide - 1) / wide);
        block_rows_total = rows / o.block_rows;
        const int64_t per_group = block_rows_total / o.groups;
        int64_t tall = o.chunk_rows ? std::max(1, o.chunk_rows / o.block_rows) : std::max<int64_t>(per_group, 1);
        tall = std::min<int64_t>(tall, kMaxLocal);
        const int64_t parts = std::max<int64_t>(1, (per_group + tall - 1) / tall);
        tall = std::max<int64_t>(1, (per_group + parts - 1) / parts);  // chunks of one height, which threads can share
        for (int32_t g = 0; g < o.groups; ++g)
            for (int64_t r = 0; r < per_group; r += tall)
                chunks.push_back({static_cast<int32_t>(g * per_group + r), static_cast<int32_t>(std::min(tall, per_group - r)), g, 0, 0});
    }

    template <class Visit>
    void visit(int64_t row, int64_t block, const Visit& found) const {
        const float* first = weight + row * o.block_rows * cols;
        const int64_t begin = block * o.column_block, end = std::min(cols, begin + o.column_block);
        for (int64_t c = begin; c < end; c += o.block_cols)
            if (!block_is_zero(first + c, cols, o.block_rows, o.block_cols)) found(first + c, (c - begin) / o.block_cols);
    }

    void count_all(int threads) {
        count.assign(block_rows_total * column_blocks, 0);
        parallel(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
            for (int64_t r = chunks[i].row; r < chunks[i].row + chunks[i].rows; ++r)
                for (int64_t b = 0; b < column_blocks; ++b) {
                    uint16_t n = 0;
                    visit(r, b, [&](const float*, int64_t) { ++n; });
                    count[r * column_blocks + b] = n;
                    chunks[i].nonzeros += n;
                }
        });
    }

    // Rows of a segment, longest first; empty ones only in the first column block, where every row gets its bias.
    std::vector<uint16_t> order(const Chunk& chunk, int64_t block) const {
        std::vector<uint16_t> rows;
        const auto length = [&](uint16_t r) { return count[(chunk.row + r) * column_blocks + block]; };
        for (int32_t r = 0; r < chunk.rows; ++r)
            if (block == 0 || length(static_cast<uint16_t>(r))) rows.push_back(static_cast<uint16_t>(r));
        std::stable_sort(rows.begin(), rows.end(), [&](uint16_t a, uint16_t b) { return length(a) > length(b); });
        return rows;
    }
};

}  // namespace

Buffer pack(const float* weight, int64_t rows, int64_t cols, const PackOptions& options, int threads) {
    check(rows, cols, options);
    Plan plan(weight, rows, cols, options);
    plan.count_all(threads);
    const auto chunks = static_cast<int64_t>(plan.chunks.size());
    const int64_t segments = chunks * plan.column_blocks, area = plan.o.block_rows * plan.o.block_cols;

    std::vector<std::vector<uint16_t>> order(segments);
    std::vector<std::vector<Run>> runs(segments);
    parallel(chunks, threads, [&](int64_t c) {
        for (int64_t b = 0; b < plan.column_blocks; ++b) {
            auto& rows_here = order[c * plan.column_blocks + b] = plan.order(plan.chunks[c], b);
            auto& runs_here = runs[c * plan.column_blocks + b];
            for (uint16_t r : rows_here) {
                const uint16_t n = plan.count[(plan.chunks[c].row + r) * plan.column_blocks + b];
                if (runs_here.empty() || runs_here.back().blocks != n) runs_here.push_back({n, 0});
                ++runs_here.back().rows;
            }
        }
    });

    std::vector<Segment> segment(segments);
    int64_t stored = 0, run_total = 0, row_total = 0;
    for (int64_t s = 0; s < segments; ++s) {
        segment[s] = {stored, static_cast<int32_t>(run_total), static_cast<int32_t>(runs[s].size()), static_cast<int32_t>(row_total), 0};
        for (const Run& r : runs[s]) stored += static_cast<int64_t>(r.blocks) * r.rows;
        run_total += static_cast<int64_t>(runs[s].size());
        row_total += static_cast<int64_t>(order[s].size());
        if (row_total > INT32_MAX) throw std::invalid_argument("the weight has too many rows and column blocks for 32-bit positions");
    }

    Layout layout{(static_cast<int64_t>(sizeof(Program)) + 63) / 64 * 64};
    Program p{};
    p.magic = kProgramMagic;
    p.rows = rows, p.cols = cols;
    p.groups = plan.o.groups, p.block_rows = plan.o.block_rows, p.block_cols = plan.o.block_cols;
    p.column_block = plan.o.column_block;
    p.chunks = static_cast<int32_t>(chunks), p.column_blocks = static_cast<int32_t>(plan.column_blocks);
    p.nonzeros = stored;
    p.chunk_at = layout.add(chunks * sizeof(Chunk));
    p.segment_at = layout.add(segments * sizeof(Segment));
    p.run_at = layout.add(run_total * sizeof(Run));
    p.row_at = layout.add(row_total * sizeof(uint16_t));
    p.value_at = layout.add(stored * area * sizeof(float));
    p.index_at = layout.add(stored * sizeof(uint16_t));
    p.bytes = layout.end;

    Buffer out = allocate(p.bytes);
    char* base = out.data.get();
    std::memcpy(base, &p, sizeof p);
    std::copy(plan.chunks.begin(), plan.chunks.end(), reinterpret_cast<Chunk*>(base + p.chunk_at));
    std::copy(segment.begin(), segment.end(), reinterpret_cast<Segment*>(base + p.segment_at));
    parallel(segments, threads, [&](int64_t s) {
        std::copy(runs[s].begin(), runs[s].end(), reinterpret_cast<Run*>(base + p.run_at) + segment[s].run);
        std::copy(order[s].begin(), order[s].end(), reinterpret_cast<uint16_t*>(base + p.row_at) + segment[s].row);
        float* value = reinterpret_cast<float*>(base + p.value_at) + segment[s].value * area;
        uint16_t* index = reinterpret_cast<uint16_t*>(base + p.index_at) + segment[s].value;
        const Chunk& chunk = plan.chunks[s / plan.column_blocks];
        for (uint16_t r : order[s])
            plan.visit(chunk.row + r, s % plan.column_blocks, [&](const float* block, int64_t local) {
                *index++ = static_cast<uint16_t>(local);
                for (int32_t i = 0; i < plan.o.block_rows; ++i)
                    for (int32_t j = 0; j < plan.o.block_cols; ++j) *value++ = block[i * cols + j];
            });
    });
    return out;
}

void unpack(const Program& p, float* weight) {
    std::fill(weight, weight + p.rows * p.cols, 0.f);
    const int64_t area = p.block_rows * p.block_cols;
    for (int32_t c = 0; c < p.chunks; ++c)
        for (int32_t b = 0; b < p.column_blocks; ++b) {
            const Segment& segment = *p.segment(c, b);
            const float* value = p.value() + segment.value * area;
            const uint16_t *index = p.index() + segment.value, *row = p.row() + segment.row;
            for (const Run* run = p.run() + segment.run; run != p.run() + segment.run + segment.runs; ++run)
                for (int32_t r = 0; r < run->rows; ++r, ++row)
                    for (int32_t n = 0; n < run->blocks; ++n, ++index, value += area)
                        for (int64_t i = 0; i < area; ++i) {
                            const int64_t y = (p.chunk()[c].row + static_cast<int64_t>(*row)) * p.block_rows + i / p.block_cols;
                            weight[y * p.cols + b * static_cast<int64_t>(p.column_block) + *index * p.block_cols + i % p.block_cols] = value[i];
                        }
        }
}

namespace {

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

float from_bfloat16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

int64_t value_bytes(ValueType type) { return type == ValueType::float32 ? 4 : type == ValueType::bfloat16 ? 2 : 1; }

}  // namespace

namespace {

// How many vectors of 16 values a mask word is best given, and how many values that spills. Cycles measured on Zen 5: a word
// by spreading, with one vector and with two, and a spilled value. Two vectors do
// not pay where values must be widened first.
constexpr double kSpread = 11.0, kWord[3] = {0.0, 5.8, 9.2}, kSpilled = 2.0;

struct Shape {
    int64_t groups, spilled;
};

Shape choose_groups(const std::vector<int64_t>& histogram, ValueType type) {
    Shape best{0, 0};
    int64_t words = 0;
    for (int64_t count : histogram) words += count;
    double least = kSpread * static_cast<double>(words);
    for (int64_t groups = 1; groups <= (type == ValueType::float32 ? 2 : 1); ++groups) {
        int64_t spilled = 0;
        for (int64_t n = 16 * groups; n <= 64; ++n) spilled += histogram[n] * (n - 16 * groups);
        const double cost = kWord[groups] * static_cast<double>(words) + kSpilled * static_cast<double>(spilled);
        if (cost < least) least = cost, best = {groups, spilled};
    }
    return best;
}

float row_scale(const float* row, int64_t cols, int64_t r) {
    float most = 0.f;
    for (int64_t c = 0; c < cols; ++c) {
        if (!std::isfinite(row[c])) throw std::invalid_argument("row " + std::to_string(r) + " has values that are not finite: int8 cannot hold them");
        most = std::max(most, std::fabs(row[c]));
    }
    return most > 0.f ? most / 127.f : 1.f;
}

// Whether anything is left of a weight as it will be stored: what rounds to zero is dropped like a zero.
bool survives(float x, ValueType type, float step) {
    if (type == ValueType::bfloat16) return (to_bfloat16(x) & 0x7fff) != 0;
    return type == ValueType::int8 ? std::lrint(x / step) != 0 : x != 0.f;
}

void put_value(char* value, int64_t at, ValueType type, float x, float step) {
    if (type == ValueType::float32) reinterpret_cast<float*>(value)[at] = x;
    if (type == ValueType::bfloat16) reinterpret_cast<uint16_t*>(value)[at] = to_bfloat16(x);
    if (type == ValueType::int8) reinterpret_cast<int8_t*>(value)[at] = static_cast<int8_t>(std::lrint(x / step));
}

float get_value(const char* value, int64_t at, ValueType type, float step) {
    if (type == ValueType::float32) return reinterpret_cast<const float*>(value)[at];
    if (type == ValueType::bfloat16) return from_bfloat16(reinterpret_cast<const uint16_t*>(value)[at]);
    return reinterpret_cast<const int8_t*>(value)[at] * step;
}

}  // namespace

Buffer pack_bits(const float* weight, int64_t rows, int64_t cols, ValueType type, int threads) {
    if (rows < 0 || cols < 0) throw std::invalid_argument("a weight has no negative size");
    if (cols > INT32_MAX) throw std::invalid_argument("a bitmask weight has at most 2^31 - 1 columns");
    const int64_t words = (cols + 63) / 64, parts = std::clamp<int64_t>(rows, 1, 256);
    std::vector<int64_t> kept(rows + 1, 0);
    std::vector<std::vector<int64_t>> histograms(parts, std::vector<int64_t>(65, 0));
    const auto each = [&](const auto& work) {
        parallel(parts, threads, [&](int64_t p) {
            for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; ++r) work(r, p);
        });
    };
    std::vector<float> step(rows, 1.f);
    const auto is_kept = [&](int64_t r, int64_t c) { return survives(weight[r * cols + c], type, step[r]); };
    each([&](int64_t r, int64_t p) {
        if (type == ValueType::int8) step[r] = row_scale(weight + r * cols, cols, r);
        for (int64_t w = 0; w < words; ++w) {
            int64_t n = 0;
            for (int64_t c = w * 64; c < std::min(cols, w * 64 + 64); ++c) n += is_kept(r, c);
            ++histograms[p][n], kept[r + 1] += n;
        }
    });
    for (int64_t p = 1; p < parts; ++p)
        for (int64_t n = 0; n <= 64; ++n) histograms[0][n] += histograms[p][n];
    const Shape shape = choose_groups(histograms[0], type);
    std::partial_sum(kept.begin(), kept.end(), kept.begin());

    Layout layout{(static_cast<int64_t>(sizeof(Bits)) + 63) / 64 * 64};
    Bits head{};
    head.magic = kBitsMagic, head.type = type;
    head.rows = rows, head.cols = cols, head.words = words, head.nonzeros = kept[rows], head.groups = shape.groups;
    head.mask_at = layout.add(rows * words * 8);
    head.start_at = layout.add((rows + 1) * 8);
    head.scale_at = layout.add(type == ValueType::int8 ? rows * 4 : 0);
    head.spill_at = layout.add((rows + 1) * 8);
    head.column_at = layout.add(shape.spilled * 4);
    head.value_at = layout.add(kept[rows] * value_bytes(type) + kSlack);
    head.bytes = layout.end;
    Buffer out = allocate(head.bytes);
    char* base = out.data.get();
    std::memset(base + head.bytes - kSlack - 64, 0, kSlack + 64);
    std::memcpy(base, &head, sizeof head);
    std::copy(kept.begin(), kept.end(), reinterpret_cast<int64_t*>(base + head.start_at));
    auto* mask = reinterpret_cast<uint64_t*>(base + head.mask_at);
    auto* scale = reinterpret_cast<float*>(base + head.scale_at);
    auto* spill = reinterpret_cast<int64_t*>(base + head.spill_at);
    spill[0] = 0;
    auto* column = reinterpret_cast<int32_t*>(base + head.column_at);
    char* value = base + head.value_at;
    const int64_t most = shape.groups ? 16 * shape.groups : 64;
    each([&](int64_t r, int64_t) {
        int64_t spilled = 0;
        for (int64_t w = 0; w < words; ++w) {
            int64_t n = 0;
            for (int64_t c = w * 64; c < std::min(cols, w * 64 + 64); ++c) n += is_kept(r, c);
            spilled += std::max<int64_t>(n - most, 0);
        }
        spill[r + 1] = spilled;
    });
    std::partial_sum(spill, spill + rows + 1, spill);
    each([&](int64_t r, int64_t) {
        const float* row = weight + r * cols;
        if (type == ValueType::int8) scale[r] = step[r];
        int64_t at = kept[r], extra = spill[r], tail = kept[r + 1] - (spill[r + 1] - spill[r]);
        for (int64_t w = 0; w < words; ++w) {
            uint64_t bits = 0;
            int64_t n = 0;
            for (int64_t c = w * 64; c < std::min(cols, w * 64 + 64); ++c) {
                if (!is_kept(r, c)) continue;
                if (n++ < most) {
                    bits |= uint64_t{1} << (c % 64);
                    put_value(value, at++, type, row[c], step[r]);
                } else {
                    column[extra++] = static_cast<int32_t>(c);
                    put_value(value, tail++, type, row[c], step[r]);
                }
            }
            mask[r * words + w] = bits;
        }
    });
    return out;
}

void unpack_bits(const Bits& bits, float* weight) {
    const char* value = bits.at<char>(bits.value_at);
    std::fill(weight, weight + bits.rows * bits.cols, 0.f);
    for (int64_t r = 0; r < bits.rows; ++r) {
        const float step = bits.type == ValueType::int8 ? bits.scale()[r] : 1.f;
        int64_t at = bits.start()[r];
        for (int64_t w = 0; w < bits.words; ++w)
            for (uint64_t word = bits.mask()[r * bits.words + w]; word; word &= word - 1)
                weight[r * bits.cols + w * 64 + __builtin_ctzll(word)] = get_value(value, at++, bits.type, step);
        for (int64_t s = bits.spill()[r]; s < bits.spill()[r + 1]; ++s)
            weight[r * bits.cols + bits.column()[s]] = get_value(value, at++, bits.type, step);
    }
}

namespace {

template <class T>
const T& as(const void* data, int64_t bytes, uint32_t magic, int64_t rows, int64_t cols) {
    const auto* head = static_cast<const T*>(data);
    if (bytes < static_cast<int64_t>(sizeof(T)) || head->magic != magic || head->bytes != bytes)
        throw std::invalid_argument("the buffer holds no packed weight of this kind");
    if (head->rows != rows || (cols >= 0 && head->cols != cols))
        throw std::invalid_argument("the packed weight is " + std::to_string(head->rows) + " x " + std::to_string(head->cols) +
                                    ", asked for as " + std::to_string(rows) + " x " + std::to_string(cols));
    return *head;
}

}  // namespace

const Program& as_program(const void* data, int64_t bytes, int64_t rows, int64_t cols) {
    return as<Program>(data, bytes, kProgramMagic, rows, cols);
}

const Bits& as_bits(const void* data, int64_t bytes, int64_t rows, int64_t cols) {
    return as<Bits>(data, bytes, kBitsMagic, rows, cols);
}

}  // namespace secateur
