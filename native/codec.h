// Entropy coding of integer streams: interleaved rANS, canonical Huffman, and an adaptive binary coder for masks.
// The formats are those of src/secateur/coding/{rans,huffman,positions}.py, which decode the same bytes without this file.
// Decoders trust nothing: they read no byte beyond the input and raise std::invalid_argument where it does not fit.
#pragma once

#include <cstdint>
#include <vector>

namespace secateur {

struct Symbols {
    const uint16_t* data;
    int64_t count;
};

struct View {
    const uint8_t* data;
    int64_t bytes;
};

std::vector<uint8_t> rans_encode(Symbols symbols, Symbols freqs, int bits, int log_lanes);
void rans_decode(View data, Symbols freqs, int bits, int log_lanes, uint16_t* out, int64_t count);

std::vector<uint8_t> huffman_encode(Symbols symbols, View lengths, Symbols codes);
void huffman_decode(View data, View lengths, Symbols codes, uint16_t* out, int64_t count);

std::vector<uint8_t> mask_encode(const uint8_t* mask, int64_t rows, int64_t cols, int density);
void mask_decode(View data, uint8_t* mask, int64_t rows, int64_t cols, int density);

}  // namespace secateur
