// How many cores this process may use, and how many of them are free.
#pragma once

#include <string>

namespace vit::engine {

// Cores whose time the control groups of this process allow it, the smallest of all nested ones; infinity where none
// limits it. `root` stands in front of the names of the system's files.
double quota(const std::string& root = "");

// What a look at the machine found: its load, the system's mean that forgets within a minute, without this process's
// own part of it; and over the time since the last look the processor time of all programs, of this process, and of
// none, in cores.
struct Look {
  double load, busy, mine, idle;
};

// Threads of other programs that want one of `cores` cores while this one has `limit` threads. The load remembers
// programs that ended a minute ago: it counts only those that wait, where no core was idle.
double others_of(const Look& look, int cores, int limit);

// Threads of `limit` that pay where `others` other threads want to run on `cores` cores: those with a core of their
// own, or this process's share of the cores where that is more; at least one.
int threads_beside(double others, int cores, int limit);

}  // namespace vit::engine
