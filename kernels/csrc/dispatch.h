// The choice among the instruction sets that this library was compiled for.
#pragma once

#include "walk.h"

namespace dape {

// Functions of the instruction set in use: the best one, unless another was chosen.
const Kernel& kernel();
// Its name and how it multiplies bfloat16.
const char* isa_label();
// Use a set by name ("auto": the best). Returns false if this processor or build lacks it.
bool choose_isa(const char* name);

}  // namespace dape
