// The functions of vit.h: check the arguments, then call the kernels of the level chosen for this machine.
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__) && !defined(VIT_CPU_BASELINE_ONLY)
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// From the lowest level to the highest; each one contains the one before it.
const Level kLevels[] = {
    {"baseline", &baseline::kernels, [] { return true; }},
#if defined(__x86_64__) && !defined(VIT_CPU_BASELINE_ONLY)
    {"v3", &v3::kernels, [] { return __builtin_cpu_supports("x86-64-v3") != 0; }},
    {"v4", &v4::kernels, [] { return __builtin_cpu_supports("x86-64-v4") != 0; }},
    {"avx512bf16", &avx512bf16::kernels,
     [] {
       return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
              __builtin_cpu_supports("avx512vnni");
     }},
#endif
};

std::string supported_names() {
  std::string names;
  for (const Level& level : kLevels)
    if (level.supported()) names += (names.empty() ? "" : ", ") + std::string(level.name);
  return names;
}

// The highest level this CPU has, or the lower one that VIT_CPU_ISA names.
const Level& choose_level() {
  const char* wanted = std::getenv("VIT_CPU_ISA");
  const Level* chosen = nullptr;
  for (const Level& level : kLevels)
    if (level.supported() && (!wanted || !*wanted || !std::strcmp(wanted, level.name))) chosen = &level;
  if (!chosen)
    throw Error("VIT_CPU_ISA is \"" + std::string(wanted) + "\"; this machine and build have " + supported_names() +
                "; unset it for the fastest");
  return *chosen;
}

const Level& active() {
  static const Level& level = choose_level();
  return level;
}

template <class P>
void run(void (*Kernels::*kernel)(const P&), const P& p) {
  check(p);
  (active().kernels->*kernel)(p);
}

}  // namespace

const Kernels& active_kernels() { return *active().kernels; }
const char* active_level() { return active().name; }

bool takes(DType dtype) { return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16; }
const char* const kTakes = "the cpu backend takes float32, float64 and bfloat16";

#define VIT_OP(name, Params, ...) \
  void name(const Params& p) { run(&Kernels::name, p); }
#define VIT_ROUTINE VIT_OP
#define VIT_WORKSPACE(name, Params) \
  std::size_t name##_workspace(const Params& p) { return (active().kernels->name##_workspace)(p); }
#include "ops.def"

std::vector<std::pair<std::string, std::string>> info() {
  return {{"isa", active().name},
          {"isa available", supported_names()},
          {"threads", threads_runtime()},
          {"compiler", __VERSION__},
          {"flags", VIT_CPU_FLAGS}};
}

}  // namespace vit
