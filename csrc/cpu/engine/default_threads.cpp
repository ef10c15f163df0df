// How many threads this process may use.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "engine/executor.h"

namespace vit::engine {

int default_threads() {
  cpu_set_t set;
  int threads =
      sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  // OpenMP does not know the quota of a container; more threads than it allows are stopped for parts of a second.
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    double quota = 0, period = 0;
    if (std::fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0)
      threads = std::min(threads, static_cast<int>(std::ceil(quota / period)));
    std::fclose(file);
  }
  return std::clamp(threads, 1, kMaxThreads);
}

}  // namespace vit::engine
