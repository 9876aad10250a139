// The choice among the instruction sets that this library was compiled for.
#pragma once

#include "walk.h"

namespace dape {

// Functions of the instruction set in use: the best one, unless another was chosen.
const Kernel& kernel();
// The name of this build.
const char* build_name();
// Use an instruction set or one build for it ("auto": the best). Returns false if this processor or library lacks it.
bool choose_isa(const char* name);

}  // namespace dape
