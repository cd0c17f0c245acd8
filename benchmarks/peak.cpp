// What this machine can do at most on one thread (CPU time): fused multiply-adds in registers, and reading memory far larger than the caches.
// Built and run by cpu_sparse.py: prints GFLOP/s and GB/s.
#include <ctime>
#include <cstdio>
#include <vector>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using vec = float __attribute__((vector_size(4 * W)));

template <class Work>
double best(int rounds, const Work& work) {
    double least = 1e9;
    for (int r = 0; r < rounds; ++r) {
        const std::clock_t start = std::clock();
        work();
        const double took = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
        if (took < least) least = took;
    }
    return least;
}

int main() {
    constexpr int kSums = 12, kLoops = 2000000;
    vec sum[kSums] = {};
    vec a = vec{} + 1e-3f, b = vec{} + 0.5f;
    const double compute = best(10, [&] {
        for (int i = 0; i < kLoops; ++i) {
#pragma GCC unroll 12
            for (int s = 0; s < kSums; ++s) sum[s] = a * b + sum[s];
            asm volatile("" : "+v"(a), "+v"(b));
        }
    });
    std::vector<float> memory(std::size_t{1} << 27, 1.f);  // 512 MiB
    vec total[8] = {};
    const double read = best(10, [&] {
        const vec* p = reinterpret_cast<const vec*>((reinterpret_cast<std::size_t>(memory.data()) + 63) / 64 * 64);
        for (std::size_t i = 0; i + 8 < memory.size() / W; i += 8)
            for (int s = 0; s < 8; ++s) total[s] += p[i + s];
    });
    volatile float sink = 0;
    for (const vec& v : sum) sink = sink + v[0];
    for (const vec& v : total) sink = sink + v[0];
    std::printf("%.0f %.1f\n", 2.0 * W * kSums * kLoops / compute / 1e9, 4e-9 * static_cast<double>(memory.size()) / read);
}
