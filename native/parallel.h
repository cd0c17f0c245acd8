// Threads. Where the process already runs an OpenMP pool (PyTorch's), ours is the same one, so that the two never compete
// for cores; elsewhere threads are started for the call.
#pragma once

#include <cstdint>
#include <functional>

namespace secateur {

// Calls work(i) once for each i in [0, units), in any order, on up to `threads` threads. An exception is rethrown here.
void parallel(int64_t units, int threads, const std::function<void(int64_t)>& work);

// Buffers that a thread keeps from call to call: a panel with its results, and a call's input made ready for all threads.
enum class Scratch { panel = 0, input = 1 };

// At least `floats` floats, 64-byte aligned, owned by the calling thread and valid until it asks for the same kind again.
float* scratch(Scratch kind, int64_t floats);

}  // namespace secateur
