#include "dispatch.h"

#include <cstring>
#include <string>
#include <vector>

namespace secateur {

namespace baseline {
const Kernels* kernels();
}
#ifdef SECATEUR_X86
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}
namespace avx512vbmi2 {
const Kernels* kernels();
}
#endif

static std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#ifdef SECATEUR_X86
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("popcnt");
    if (wide && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) found.push_back(avx512vbmi2::kernels());
    if (wide) found.push_back(avx512::kernels());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt"))
        found.push_back(avx2::kernels());
#endif
    found.push_back(baseline::kernels());
    return found;
}

const char* available_kernels() {
    static const std::string names = [] {
        std::string text;
        for (const Kernels* k : runnable()) text += (text.empty() ? "" : ",") + std::string(k->name);
        return text;
    }();
    return names.c_str();
}

const Kernels* find_kernels(const char* name) {
    static const std::vector<const Kernels*> found = runnable();
    if (!name || !*name) return found.front();
    for (const Kernels* k : found)
        if (!std::strcmp(k->name, name)) return k;
    return nullptr;
}

}  // namespace secateur
