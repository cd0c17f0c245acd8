// Which instruction set to run: the best that was compiled in and that this machine has, or the one asked for.
#pragma once

#include "kernels.h"

namespace secateur {

// Names from best to least, separated by commas, of the sets that can run here.
const char* available_kernels();

// Best set where `name` is null or empty; null where the named set cannot run here.
const Kernels* find_kernels(const char* name);

}  // namespace secateur
