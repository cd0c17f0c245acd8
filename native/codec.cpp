#include "codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace secateur {

namespace {

[[noreturn]] void broken(const char* what) { throw std::invalid_argument(what); }

uint32_t load32(const uint8_t* p) { return p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24; }

void store32(uint8_t* p, uint32_t x) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(x >> (8 * i));
}

std::vector<uint32_t> starts_of(Symbols freqs, int bits) {
    std::vector<uint32_t> starts(static_cast<size_t>(freqs.count) + 1, 0);
    for (int64_t k = 0; k < freqs.count; ++k) starts[k + 1] = starts[k] + freqs.data[k];
    if (bits < 1 || bits > 15 || starts.back() != 1u << bits) broken("the frequencies do not add up to their total");
    return starts;
}

constexpr uint32_t kLow = 1u << 16;  // lower bound of a state between symbols; words of 16 bits go in and out

}  // namespace

std::vector<uint8_t> rans_encode(Symbols symbols, Symbols freqs, int bits, int log_lanes) {
    const auto starts = starts_of(freqs, bits);
    const int64_t lanes = int64_t(1) << log_lanes;
    std::vector<uint32_t> states(static_cast<size_t>(lanes), kLow);
    std::vector<uint16_t> words;
    words.reserve(static_cast<size_t>(symbols.count / 4 + 16));
    for (int64_t i = symbols.count - 1; i >= 0; --i) {
        const uint16_t s = symbols.data[i];
        if (s >= freqs.count || freqs.data[s] == 0) broken("a symbol has no frequency");
        const uint32_t f = freqs.data[s];
        uint32_t& x = states[i & (lanes - 1)];
        if (x >= uint64_t(f) << (32 - bits)) {
            words.push_back(static_cast<uint16_t>(x));
            x >>= 16;
        }
        x = ((x / f) << bits) + x % f + starts[s];
    }
    std::vector<uint8_t> out(static_cast<size_t>(4 * lanes) + 2 * words.size());
    for (int64_t j = 0; j < lanes; ++j) store32(&out[4 * j], states[j]);
    uint8_t* at = out.data() + 4 * lanes;
    for (auto word = words.rbegin(); word != words.rend(); ++word, at += 2) {
        at[0] = static_cast<uint8_t>(*word);
        at[1] = static_cast<uint8_t>(*word >> 8);
    }
    return out;
}

void rans_decode(View data, Symbols freqs, int bits, int log_lanes, uint16_t* out, int64_t count) {
    const auto starts = starts_of(freqs, bits);
    const int64_t lanes = int64_t(1) << log_lanes;
    if (data.bytes < 4 * lanes || data.bytes % 2) broken("the stream is cut short");
    struct Slot {
        uint16_t symbol, freq, offset;
    };
    std::vector<Slot> table(size_t(1) << bits);
    for (int64_t k = 0; k < freqs.count; ++k)
        for (uint32_t i = 0; i < freqs.data[k]; ++i) table[starts[k] + i] = {uint16_t(k), freqs.data[k], uint16_t(i)};
    std::vector<uint32_t> states(static_cast<size_t>(lanes));
    for (int64_t j = 0; j < lanes; ++j) states[j] = load32(data.data + 4 * j);
    const uint8_t* at = data.data + 4 * lanes;
    const uint8_t* end = data.data + data.bytes;
    const uint32_t mask = (1u << bits) - 1;
    const Slot* slots = table.data();
    uint32_t* state = states.data();
    for (int64_t base = 0; base < count; base += lanes) {
        const int64_t here = std::min(lanes, count - base);
        if (end - at >= 2 * here) {  // no lane of this row can run out: no branches
            for (int64_t j = 0; j < here; ++j) {
                uint32_t x = state[j];
                const Slot slot = slots[x & mask];
                out[base + j] = slot.symbol;
                x = slot.freq * (x >> bits) + slot.offset;
                const uint32_t more = x < kLow;
                uint16_t word;
                std::memcpy(&word, at, 2);
                x = more ? (x << 16) | word : x;
                at += 2 * more;
                state[j] = x;
            }
            continue;
        }
        for (int64_t j = 0; j < here; ++j) {
            uint32_t x = state[j];
            const Slot slot = slots[x & mask];
            out[base + j] = slot.symbol;
            x = slot.freq * (x >> bits) + slot.offset;
            if (x < kLow) {
                if (at == end) broken("the stream is cut short");
                x = (x << 16) | at[0] | uint32_t(at[1]) << 8;
                at += 2;
            }
            state[j] = x;
        }
    }
    if (at != end) broken("the stream goes on after its last symbol");
    for (uint32_t x : states)
        if (x != kLow) broken("the stream does not end as it began");
}

std::vector<uint8_t> huffman_encode(Symbols symbols, View lengths, Symbols codes) {
    std::vector<uint8_t> out;
    out.reserve(static_cast<size_t>(symbols.count / 2 + 16));
    uint64_t held = 0;
    int used = 0;
    for (int64_t i = 0; i < symbols.count; ++i) {
        const uint16_t s = symbols.data[i];
        if (s >= codes.count || lengths.data[s] == 0) broken("a symbol has no code");
        held = held << lengths.data[s] | codes.data[s];
        used += lengths.data[s];
        while (used >= 8) out.push_back(static_cast<uint8_t>(held >> (used -= 8)));
    }
    if (used) out.push_back(static_cast<uint8_t>(held << (8 - used)));
    return out;
}

void huffman_decode(View data, View lengths, Symbols codes, uint16_t* out, int64_t count) {
    constexpr int kBits = 15;
    struct Slot {
        uint16_t symbol;
        uint16_t length;
    };
    std::vector<Slot> table(size_t(1) << kBits, Slot{0, 0});
    for (int64_t k = 0; k < codes.count; ++k) {
        const int length = lengths.data[k];
        if (length == 0) continue;
        if (length > kBits || codes.data[k] >> length) broken("a code is longer than 15 bits");
        const uint32_t first = uint32_t(codes.data[k]) << (kBits - length);
        std::fill_n(table.begin() + first, size_t(1) << (kBits - length), Slot{uint16_t(k), uint16_t(length)});
    }
    uint64_t held = 0;
    int have = 0;
    int64_t at = 0;
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
        while (have <= 48) {
            held = held << 8 | (at < data.bytes ? data.data[at] : 0);
            ++at;
            have += 8;
        }
        const Slot slot = table[(held >> (have - kBits)) & ((1u << kBits) - 1)];
        if (slot.length == 0) broken("the stream holds bits that are no code");
        out[i] = slot.symbol;
        have -= slot.length;
        used += slot.length;
        if (used > 8 * data.bytes) broken("the stream is cut short");
    }
    if ((used + 7) / 8 != data.bytes) broken("the stream goes on after its last symbol");
}

namespace {

constexpr int kCounts = 1024;

struct Rates {
    uint32_t of[kCounts];
    Rates() {
        for (int n = 0; n < kCounts; ++n) of[n] = 131072u / (2 * n + 3);
    }
};
const Rates kRates;

// Probability of a one in 2^-28, so that small ones do not drift, moving by 1 / (n + 1.5).
struct Adaptive {
    uint32_t fine;
    uint32_t n;
    static Adaptive at(uint32_t p, uint32_t n) { return {p << 12, n}; }
    uint32_t p() const { return fine >> 12; }
    void see(int bit, uint32_t limit) {
        fine = static_cast<uint32_t>(int64_t(fine) + (((int64_t(bit) << 28) - int64_t(fine)) * kRates.of[n] >> 16));
        if (n < limit) ++n;
    }
};

// A binary arithmetic coder: 32-bit range, carries resolved in the bytes already written.
class Writer {
  public:
    std::vector<uint8_t> out;

    void put(int bit, uint32_t p) {
        const uint32_t bound = (range_ >> 16) * p;
        if (bit) {
            range_ = bound;
        } else {
            low_ += bound;
            range_ -= bound;
        }
        while (range_ < 1u << 24) {
            shift();
            range_ <<= 8;
        }
    }

    void finish() {
        // The shortest number inside the last interval: zeros at its end are not written, the reader supplies them.
        const uint64_t top = low_ + range_ - 1;
        for (int zeros = 32; zeros >= 0; zeros -= 8) {
            const uint64_t value = top >> zeros << zeros;
            if (value >= low_) {
                low_ = value;
                break;
            }
        }
        for (int i = 0; i < 4; ++i) shift();
        while (!out.empty() && out.back() == 0) out.pop_back();
    }

  private:
    uint64_t low_ = 0;
    uint32_t range_ = 0xFFFFFFFFu;

    void shift() {
        if (low_ >> 32) {
            for (auto byte = out.rbegin(); byte != out.rend() && ++*byte == 0; ++byte) {
            }
        }
        out.push_back(static_cast<uint8_t>(low_ >> 24));
        low_ = (low_ & 0xFFFFFF) << 8;
    }
};

class Reader {
  public:
    explicit Reader(View data) : data_(data) {
        for (int i = 0; i < 4; ++i) next();
    }

    int get(uint32_t p) {
        const uint32_t bound = (range_ >> 16) * p;
        const int bit = code_ < bound;
        if (bit) {
            range_ = bound;
        } else {
            code_ -= bound;
            range_ -= bound;
        }
        while (range_ < 1u << 24) {
            next();
            range_ <<= 8;
        }
        return bit;
    }

    void finish() const {
        if (at_ < data_.bytes) broken("the positions end before their stream");
    }

  private:
    View data_;
    int64_t at_ = 0;
    uint32_t code_ = 0;
    uint32_t range_ = 0xFFFFFFFFu;

    void next() {
        code_ = code_ << 8 | (at_ < data_.bytes ? data_.data[at_] : 0);
        ++at_;
    }
};

uint32_t clamped(uint32_t p) { return std::clamp<uint32_t>(p, 16, 65536 - 16); }

// The model that both sides run: a cell's probability follows its row so far, its column so far, and two neighbours.
template <class Code>
void model(uint8_t* mask, int64_t rows, int64_t cols, int density, Code code) {
    std::vector<uint8_t> live_row(static_cast<size_t>(rows)), live_col(static_cast<size_t>(cols));
    const auto flags = [&](std::vector<uint8_t>& flag, bool by_row) {
        Adaptive seen = Adaptive::at(32768, 0);
        for (int64_t i = 0; i < static_cast<int64_t>(flag.size()); ++i) {
            flag[i] = static_cast<uint8_t>(code.flag(i, by_row, clamped(seen.p())));
            seen.see(flag[i], 255);
        }
    };
    flags(live_row, true);
    flags(live_col, false);
    std::vector<int64_t> columns;
    for (int64_t c = 0; c < cols; ++c)
        if (live_col[c]) columns.push_back(c);
    const uint64_t inverse = (uint64_t(16) << 16) / static_cast<uint64_t>(density);
    const auto level = [&](uint32_t p) {
        const uint32_t ratio = static_cast<uint32_t>(std::min<uint64_t>((p * inverse) >> 16, 255));
        return std::clamp<int>(std::bit_width(ratio), 1, 8) - 1;
    };
    const uint32_t window = static_cast<uint32_t>(std::clamp(4 * 65536 / density, 63, 1023));
    Adaptive cells[8][8][4];
    for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c)
            for (auto& cell : cells[r][c]) {
                const int shift = (r + c - 8) / 2;
                const uint64_t p = shift >= 0 ? uint64_t(density) << shift : uint64_t(density) >> -shift;
                cell = Adaptive::at(static_cast<uint32_t>(std::clamp<uint64_t>(p, 16, 60000)), 3);
            }
    std::vector<Adaptive> column(columns.size(), Adaptive::at(uint32_t(density), 3));
    std::vector<uint8_t> column_level(columns.size(), static_cast<uint8_t>(level(density))), above(columns.size(), 0);
    for (int64_t r = 0; r < rows; ++r) {
        uint8_t* line = mask + r * cols;
        if (!live_row[r]) {
            std::fill(above.begin(), above.end(), 0);
            continue;
        }
        Adaptive row = Adaptive::at(uint32_t(density), 3);
        int left = 0;
        for (size_t k = 0; k < columns.size(); ++k) {
            Adaptive& cell = cells[level(row.p())][column_level[k]][left * 2 + above[k]];
            const int bit = code.cell(line[columns[k]], clamped(cell.p()));
            cell.see(bit, 1023);
            row.see(bit, window);
            column[k].see(bit, window);
            column_level[k] = static_cast<uint8_t>(level(column[k].p()));
            left = above[k] = static_cast<uint8_t>(bit);
        }
    }
}

}  // namespace

std::vector<uint8_t> mask_encode(const uint8_t* mask, int64_t rows, int64_t cols, int density) {
    if (density < 1 || density > 65535) broken("the density must be 1 to 65535");
    std::vector<uint8_t> live_row(static_cast<size_t>(rows), 0), live_col(static_cast<size_t>(cols), 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
            if (mask[r * cols + c]) live_row[r] = live_col[c] = 1;
    Writer writer;
    struct Encode {
        Writer& writer;
        const std::vector<uint8_t>&rows, &cols;
        int flag(int64_t i, bool by_row, uint32_t p) {
            const int bit = by_row ? rows[i] : cols[i];
            writer.put(bit, p);
            return bit;
        }
        int cell(uint8_t& value, uint32_t p) {
            const int bit = value != 0;
            writer.put(bit, p);
            return bit;
        }
    };
    model(const_cast<uint8_t*>(mask), rows, cols, density, Encode{writer, live_row, live_col});
    writer.finish();
    return std::move(writer.out);
}

void mask_decode(View data, uint8_t* mask, int64_t rows, int64_t cols, int density) {
    if (density < 1 || density > 65535) broken("the density must be 1 to 65535");
    Reader reader(data);
    struct Decode {
        Reader& reader;
        int flag(int64_t, bool, uint32_t p) { return reader.get(p); }
        int cell(uint8_t& value, uint32_t p) { return value = static_cast<uint8_t>(reader.get(p)); }
    };
    model(mask, rows, cols, density, Decode{reader});
    reader.finish();
}

}  // namespace secateur
