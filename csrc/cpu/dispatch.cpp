// The functions of vit.h: check the arguments, then call the kernels of the level chosen for this machine.
#include <type_traits>

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

const Kernels* const kLevels[] = {
#define VIT_LEVEL(level) &level::kernels,
    VIT_CPU_LEVELS(VIT_LEVEL)
#undef VIT_LEVEL
};

// The functions of the highest level that has them; of a partial level only those of bfloat16 and of products of int8.
Kernels best_kernels(bool bfloat16) {
  Kernels best{};
  for (std::size_t level = 0; level <= active_isa(); ++level) {
    const Kernels& given = *kLevels[level];
#define VIT_OP(name, Params, ...) \
  if (given.name && (bfloat16 || !given.partial || std::is_same_v<Params, LinearInt8>)) best.name = given.name;
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) VIT_OP(name##_workspace, Params)
#include "ops.def"
  }
  return best;
}

const Kernels& active_kernels(DType dtype) {
  static const Kernels bfloat16 = best_kernels(true), others = best_kernels(false);
  return dtype == DType::bfloat16 ? bfloat16 : others;
}

template <class P>
void run(void (*Kernels::*kernel)(const P&), const P& p) {
  check(p);
  (active_kernels(p.dtype).*kernel)(p);
}

}  // namespace

bool takes(DType dtype) { return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16; }
const char* const kTakes = "the cpu backend takes float32, float64 and bfloat16";

#define VIT_OP(name, Params, ...) \
  void name(const Params& p) { run(&Kernels::name, p); }
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) \
  std::size_t name##_workspace(const Params& p) { return active_kernels(p.dtype).name##_workspace(with_a_thread(p)); }
#include "ops.def"

std::vector<std::pair<std::string, std::string>> info() {
  return {{"isa", active_level()},
          {"isa available", supported_levels()},
          {"threads", threads_runtime()},
          {"compiler", __VERSION__},
          {"flags", VIT_CPU_FLAGS}};
}

}  // namespace vit
