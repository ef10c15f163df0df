// Which of the instruction-set levels of levels.h runs here; shared by the backends that are compiled once per level.
#pragma once

#include <cstddef>
#include <string>

namespace vit {

// The fastest level of this CPU, or the one that VIT_CPU_ISA names: its place in VIT_CPU_LEVELS. Chosen at the
// first call; throws vit::Error when VIT_CPU_ISA names none that this machine and build have.
std::size_t active_isa();

// Its name.
const char* active_level();

// The names of all levels this machine has, separated by commas.
std::string supported_levels();

}  // namespace vit
