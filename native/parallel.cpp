#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace secateur {

namespace {

struct Queue {
    std::atomic<int64_t> next{0};
    int64_t units;
    const std::function<void(int64_t)>* work;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
};

void drain(void* data) {
    auto& queue = *static_cast<Queue*>(data);
    try {
        for (int64_t i; (i = queue.next.fetch_add(1)) < queue.units;) (*queue.work)(i);
    } catch (...) {
        if (!queue.failed.exchange(true)) queue.error = std::current_exception();
        queue.next = queue.units;
    }
}

using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The entry point that compilers emit for `omp parallel`: its signature is a fixed interface of libgomp and libomp.
OpenMP openmp() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

void parallel(int64_t units, int threads, const std::function<void(int64_t)>& work) {
    Queue queue;
    queue.units = units;
    queue.work = &work;
    const auto wanted = static_cast<unsigned>(std::min<int64_t>(std::max(threads, 1), units));
    if (wanted <= 1) {
        drain(&queue);
    } else if (OpenMP run = openmp()) {
        run(drain, &queue, wanted, 0);
    } else {
        std::vector<std::thread> others;
        for (unsigned t = 1; t < wanted; ++t) others.emplace_back(drain, &queue);
        drain(&queue);
        for (auto& other : others) other.join();
    }
    if (queue.error) std::rethrow_exception(queue.error);
}

float* scratch(Scratch kind, int64_t floats) {
    thread_local Buffer buffers[2];
    Buffer& buffer = buffers[static_cast<int>(kind)];
    if (buffer.size < floats) {
        std::free(buffer.data);
        buffer.size = 0;
        buffer.data = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = floats;
    }
    return buffer.data;
}

}  // namespace secateur
