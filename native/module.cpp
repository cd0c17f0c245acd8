// The Python side: addresses and sizes in, nothing of PyTorch. Callers (runtime/native.py) own and check the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "product.h"
#include "weights.h"

namespace nb = nanobind;
using namespace secateur;

namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Bytes give(Buffer&& buffer) {
    char* data = buffer.data.release();
    nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
    const size_t size = static_cast<size_t>(buffer.bytes);
    return Bytes(data, {size}, owner);
}

// Sizes of the input, and kernel, stride, padding, dilation and padding at the end; eight numbers pad both ends alike.
ConvShape shape_of(const nb::tuple& input, const nb::tuple& geometry) {
    const auto in = [&](int i) { return nb::cast<int64_t>(input[i]); };
    const auto at = [&](int i) { return nb::cast<int64_t>(geometry[i]); };
    const int end = nb::len(geometry) > 8 ? 8 : 4;
    return {in(0), in(1), in(2), in(3), at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(end), at(end + 1)};
}

const Kernels& kernels(const std::string& isa) {
    const Kernels* found = find_kernels(isa.c_str());
    if (!found) throw std::invalid_argument("this machine cannot run " + isa + " kernels; it has " + available_kernels());
    return *found;
}

}  // namespace

void bind_codec(nb::module_& m);     // codec_module.cpp
void bind_gathered(nb::module_& m);  // gathered_module.cpp

NB_MODULE(_native, m) {
    bind_codec(m);
    bind_gathered(m);
    m.doc() = "Sparse CPU kernels. Addresses are those of contiguous float32 memory; the caller answers for their size.";
    m.def("kernels", [] { return std::string(available_kernels()); }, "Instruction sets that can run here, best first.");
    m.def(
        "pack",
        [](uintptr_t weight, int64_t rows, int64_t cols, int groups, int block_rows, int block_cols, int column_block, int chunk_rows, int threads) {
            Buffer out;
            {
                nb::gil_scoped_release release;
                out = pack(pointer<const float>(weight), rows, cols, {groups, block_rows, block_cols, column_block, chunk_rows}, threads);
            }
            return give(std::move(out));
        },
        "Dense [rows, cols] to a packed program.");
    m.def(
        "unpack",
        [](uintptr_t program, int64_t bytes, int64_t rows, int64_t cols, uintptr_t weight) {
            unpack(as_program(pointer<void>(program), bytes, rows, cols), pointer<float>(weight));
        },
        "A packed program to dense [rows, cols].");
    m.def(
        "pack_bits",
        [](uintptr_t weight, int64_t rows, int64_t cols, int type, int threads) {
            if (type < 0 || type > 2) throw std::invalid_argument("value types are 0 (float32), 1 (bfloat16) and 2 (int8)");
            Buffer out;
            {
                nb::gil_scoped_release release;
                out = pack_bits(pointer<const float>(weight), rows, cols, static_cast<ValueType>(type), threads);
            }
            return give(std::move(out));
        },
        nb::arg("weight"), nb::arg("rows"), nb::arg("cols"), nb::arg("type"), nb::arg("threads") = 1, "Dense [rows, cols] to a bitmask and its values.");
    m.def(
        "unpack_bits",
        [](uintptr_t bits, int64_t bytes, int64_t rows, int64_t cols, uintptr_t weight) {
            unpack_bits(as_bits(pointer<void>(bits), bytes, rows, cols), pointer<float>(weight));
        },
        "A bitmask weight to dense [rows, cols].");
    m.def(
        "linear",
        [](uintptr_t program, int64_t bytes, int64_t out, int64_t in, uintptr_t x, int64_t rows, int64_t stride, uintptr_t y, uintptr_t bias, int activation, int threads, const std::string& isa) {
            const Kernels& k = kernels(isa);
            const Program& weight = as_program(pointer<void>(program), bytes, out, in);
            nb::gil_scoped_release release;
            linear(k, weight, pointer<const float>(x), rows, stride, pointer<float>(y), {pointer<const float>(bias), static_cast<Activation>(activation)}, threads);
        },
        "y[rows, out] = activation(x W^T + bias).");
    m.def(
        "matvec",
        [](uintptr_t bits, int64_t bytes, int64_t out, int64_t in, uintptr_t x, int64_t rows, int64_t stride, uintptr_t y, uintptr_t bias, int activation, int threads, const std::string& isa) {
            const Kernels& k = kernels(isa);
            const Bits& weight = as_bits(pointer<void>(bits), bytes, out, in);
            nb::gil_scoped_release release;
            matvec(k, weight, pointer<const float>(x), rows, stride, pointer<float>(y), {pointer<const float>(bias), static_cast<Activation>(activation)}, threads);
        },
        "As linear(), for a few rows.");
    m.def(
        "conv2d",
        [](uintptr_t program, int64_t bytes, int64_t out, uintptr_t x, nb::tuple input, nb::tuple geometry, uintptr_t y, uintptr_t bias, int activation, int threads, const std::string& isa) {
            const ConvShape shape = shape_of(input, geometry);
            const Kernels& k = kernels(isa);
            const Program& weight = as_program(pointer<void>(program), bytes, out, -1);
            if (weight.cols * weight.groups != shape.channels * shape.kernel_h * shape.kernel_w)
                throw std::invalid_argument("the packed weight belongs to a convolution of another shape");
            nb::gil_scoped_release release;
            conv2d(k, weight, pointer<const float>(x), shape, pointer<float>(y), {pointer<const float>(bias), static_cast<Activation>(activation)}, threads);
        },
        "Convolution of x[images, channels, height, width]; geometry = kernel, stride, padding above and left, dilation, padding below "
        "and right, as ten numbers.");
    m.def(
        "depthwise",
        [](uintptr_t weight, uintptr_t x, nb::tuple input, nb::tuple geometry, uintptr_t y, uintptr_t bias, int activation, int threads, const std::string& isa) {
            const ConvShape shape = shape_of(input, geometry);
            const Kernels& k = kernels(isa);
            nb::gil_scoped_release release;
            depthwise(k, pointer<const float>(weight), pointer<const float>(x), shape, pointer<float>(y), {pointer<const float>(bias), static_cast<Activation>(activation)}, threads);
        },
        "Each channel of x with its own kernel, weight[channels, height, width]; geometry as of conv2d.");
}
