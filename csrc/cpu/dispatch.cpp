// The functions of vit.h: check the arguments, then call the kernels of the level chosen for this machine.
#include "check.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"
#include "cpu/threads.h"

namespace vit {

#define VIT_LEVEL(level)        \
  namespace level {             \
  extern const Kernels kernels; \
  }
VIT_CPU_LEVELS(VIT_LEVEL)
#undef VIT_LEVEL

namespace {

const Kernels* const kTables[] = {
#define VIT_LEVEL(level) &level::kernels,
    VIT_CPU_LEVELS(VIT_LEVEL)
#undef VIT_LEVEL
};

template <class P>
void run(void (*Kernels::*kernel)(const P&), const P& p) {
  check(p);
  (active_kernels().*kernel)(p);
}

}  // namespace

const Kernels& active_kernels() {
  static const Kernels& kernels = *kTables[active_isa()];
  return kernels;
}

bool takes(DType dtype) { return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16; }
const char* const kTakes = "the cpu backend takes float32, float64 and bfloat16";

#define VIT_OP(name, Params, ...) \
  void name(const Params& p) { run(&Kernels::name, p); }
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) \
  std::size_t name##_workspace(const Params& p) { return (active_kernels().name##_workspace)(with_a_thread(p)); }
#include "ops.def"

std::vector<std::pair<std::string, std::string>> info() {
  return {{"isa", active_level()},
          {"isa available", supported_levels()},
          {"threads", threads_runtime()},
          {"compiler", __VERSION__},
          {"flags", VIT_CPU_FLAGS}};
}

}  // namespace vit
