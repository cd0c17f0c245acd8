// The Python side of gathered.h: addresses and sizes in, as in module.cpp; indices are checked, the rest is the caller's.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "gathered.h"

namespace nb = nanobind;
using namespace secateur;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const Kernels& kernels(const std::string& isa) {
    const Kernels* found = find_kernels(isa.c_str());
    if (!found) throw std::invalid_argument("this machine cannot run " + isa + " kernels; it has " + available_kernels());
    return *found;
}

}  // namespace

void bind_gathered(nb::module_& m) {
    m.def(
        "thin_around",
        [](uintptr_t weight, int64_t rows, int64_t cols, uintptr_t x, float threshold, uintptr_t centre, uintptr_t scale, uintptr_t bias, uintptr_t y, int threads, const std::string& isa) {
            const Kernels& k = kernels(isa);
            nb::gil_scoped_release release;
            const Large large{threshold, pointer<const float>(centre), pointer<const float>(scale)};
            return thin(k, pointer<const float>(weight), rows, cols, pointer<const float>(x), large, pointer<const float>(bias), pointer<float>(y), threads);
        },
        "y[cols] = bias + the rows of weight[rows, cols] whose |x - centre| scale is above the threshold, times x - centre. Returns how many they are.");
    m.def(
        "combine",
        [](uintptr_t weight, int64_t rows, int64_t cols, uintptr_t index, uintptr_t factor, int64_t count, uintptr_t bias, uintptr_t y, int threads, const std::string& isa) {
            const Kernels& k = kernels(isa);
            nb::gil_scoped_release release;
            combine(k, pointer<const float>(weight), rows, cols, pointer<const int32_t>(index), pointer<const float>(factor), count, pointer<const float>(bias), pointer<float>(y), threads);
        },
        "y[cols] = bias + sum of factor[i] weight[index[i], :].");
    m.def(
        "gather",
        [](uintptr_t weight, int64_t rows, int64_t cols, uintptr_t index, int64_t count, uintptr_t x, uintptr_t bias, int activation, uintptr_t y, int threads, const std::string& isa) {
            const Kernels& k = kernels(isa);
            nb::gil_scoped_release release;
            gather(k, pointer<const float>(weight), rows, cols, pointer<const int32_t>(index), count, pointer<const float>(x), {pointer<const float>(bias), static_cast<Activation>(activation)}, pointer<float>(y), threads);
        },
        "y[i] = activation(weight[index[i], :] x + bias[index[i]]).");
}
