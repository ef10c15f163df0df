#include "cpu/isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

#include "cpu/levels.h"
#include "vit.h"

namespace vit {
namespace {

bool has_baseline() { return true; }
#if defined(__x86_64__) && !defined(VIT_CPU_BASELINE_ONLY)
bool has_v3() { return __builtin_cpu_supports("x86-64-v3") != 0; }
bool has_v4() { return __builtin_cpu_supports("x86-64-v4") != 0; }
bool has_avx512vnni() { return has_v4() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#if !defined(VIT_VECTOR_LEVELS_ONLY)
// The kernel keeps the matrix registers from a process until it asks (Linux 5.16; refused where an alternative signal
// stack is too small for them). Threads and forked children inherit the permission.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
#endif

// Intel's cores start a vdpbf16ps every other cycle: half the products of bfloat16 that their two fused multiply-adds
// of float a cycle make of widened ones (171 and 347 GFLOP/s on two cores of an Emerald Rapids). AMD's start one or
// two.
bool has_slow_dot() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

struct Level {
  const char* name;
  bool (*supported)();

  // Whether it is better than the levels before it.
  bool preferred() const { return std::strcmp(name, "avx512bf16") != 0 || !has_slow_dot(); }
};

// From the lowest level to the highest; each one contains the one before it.
const Level kLevels[] = {
#define VIT_LEVEL(name) {#name, has_##name},
    VIT_CPU_LEVELS(VIT_LEVEL)
#undef VIT_LEVEL
};

const Level& choose_level() {
  const char* wanted = std::getenv("VIT_CPU_ISA");
  const Level* chosen = nullptr;
  for (const Level& level : kLevels)
    if (level.supported() && (wanted && *wanted ? !std::strcmp(wanted, level.name) : level.preferred()))
      chosen = &level;
  if (!chosen)
    throw Error("VIT_CPU_ISA is \"" + std::string(wanted) + "\"; this machine and build have " + supported_levels() +
                "; unset it for the fastest");
  return *chosen;
}

const Level& active() {
  static const Level& level = choose_level();
  return level;
}

}  // namespace

std::size_t active_isa() { return static_cast<std::size_t>(&active() - kLevels); }
const char* active_level() { return active().name; }

std::string supported_levels() {
  std::string names;
  for (const Level& level : kLevels)
    if (level.supported()) names += (names.empty() ? "" : ", ") + std::string(level.name);
  return names;
}

}  // namespace vit
