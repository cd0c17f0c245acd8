// The Python side of codec.h: numpy arrays in and out, sizes checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "codec.h"

namespace nb = nanobind;
using namespace secateur;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

Bytes give(std::vector<uint8_t>&& found) {
    auto* kept = new std::vector<uint8_t>(std::move(found));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<uint8_t>*>(p); });
    return Bytes(kept->data(), {kept->size()}, owner);
}

Symbols symbols(const In<uint16_t>& array) { return {array.data(), static_cast<int64_t>(array.shape(0))}; }
View view(const In<uint8_t>& array) { return {array.data(), static_cast<int64_t>(array.shape(0))}; }

int lanes(int log_lanes) {
    if (log_lanes < 0 || log_lanes > 16) throw std::invalid_argument("lanes must be 2^0 to 2^16");
    return log_lanes;
}

int64_t cells(size_t given, int64_t rows, int64_t cols) {
    if (rows < 1 || cols < 1 || rows > (int64_t(1) << 40) / cols || given != static_cast<size_t>(rows * cols))
        throw std::invalid_argument("the mask has another size than its rows and columns say");
    return rows * cols;
}

void same(size_t one, size_t other) {
    if (one != other) throw std::invalid_argument("as many lengths as codes are needed");
}

}  // namespace

void bind_codec(nb::module_& m) {
    m.def("rans_encode", [](In<uint16_t> data, In<uint16_t> freqs, int bits, int log_lanes) {
        std::vector<uint8_t> out;
        {
            nb::gil_scoped_release release;
            out = rans_encode(symbols(data), symbols(freqs), bits, lanes(log_lanes));
        }
        return give(std::move(out));
    });
    m.def("rans_decode", [](In<uint8_t> data, In<uint16_t> freqs, int bits, int log_lanes, Out<uint16_t> out) {
        nb::gil_scoped_release release;
        rans_decode(view(data), symbols(freqs), bits, lanes(log_lanes), out.data(), static_cast<int64_t>(out.shape(0)));
    });
    m.def("huffman_encode", [](In<uint16_t> data, In<uint8_t> lengths, In<uint16_t> codes) {
        same(lengths.shape(0), codes.shape(0));
        std::vector<uint8_t> out;
        {
            nb::gil_scoped_release release;
            out = huffman_encode(symbols(data), view(lengths), symbols(codes));
        }
        return give(std::move(out));
    });
    m.def("huffman_decode", [](In<uint8_t> data, In<uint8_t> lengths, In<uint16_t> codes, Out<uint16_t> out) {
        same(lengths.shape(0), codes.shape(0));
        nb::gil_scoped_release release;
        huffman_decode(view(data), view(lengths), symbols(codes), out.data(), static_cast<int64_t>(out.shape(0)));
    });
    m.def("mask_encode", [](In<uint8_t> mask, int64_t rows, int64_t cols, int density) {
        cells(mask.shape(0), rows, cols);
        std::vector<uint8_t> out;
        {
            nb::gil_scoped_release release;
            out = mask_encode(mask.data(), rows, cols, density);
        }
        return give(std::move(out));
    });
    m.def("mask_decode", [](In<uint8_t> data, int64_t rows, int64_t cols, int density, Out<uint8_t> mask) {
        cells(mask.shape(0), rows, cols);
        nb::gil_scoped_release release;
        mask_decode(view(data), mask.data(), rows, cols, density);
    });
}
