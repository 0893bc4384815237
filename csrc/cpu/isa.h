// Which instruction sets this build and this machine have, and which one runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pagewire::cpu {

// Best first; what was built and the machine can run.
std::vector<const Kernels*> usable_kernels();

// The best, or the one named. Throws std::invalid_argument naming the usable ones.
const Kernels& choose_kernels(const std::string& name);

}  // namespace pagewire::cpu
