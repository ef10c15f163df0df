// How many cores this process may use, and how many of them are free.
#pragma once

#include <string>

namespace vit::engine {

// Cores whose time the control groups of this process allow it, the smallest of all nested ones; infinity where none
// limits it. `root` stands in front of the names of the system's files.
double quota(const std::string& root = "");

// Threads of `limit` that pay where `others` other threads want to run on `cores` cores: those with a core of their
// own, or this process's share of the cores where that is more; at least one.
int threads_beside(double others, int cores, int limit);

}  // namespace vit::engine
