// The functions of vit.h: check the arguments, then call the Mojo kernels of the level chosen for this machine.
#include "check.h"
#include "cpu/isa.h"
#include "cpu/levels.h"
#include "cpu/threads.h"
#include "mojo/kernels.h"

namespace vit {

#define VIT_LEVEL(level)            \
  namespace level {                 \
  extern const MojoKernels kernels; \
  }
VIT_CPU_LEVELS(VIT_LEVEL)
#undef VIT_LEVEL

// What kernels/threads.mojo calls: the OpenMP threads the process already has, as in the cpu backend.
extern "C" void vit_mojo_run_threads(int32_t threads, void (*body)(void*, int32_t, int32_t), void* data) {
  run_threads(threads, body, data);
}

namespace {

const MojoKernels* const kTables[] = {
#define VIT_LEVEL(level) &level::kernels,
    VIT_CPU_LEVELS(VIT_LEVEL)
#undef VIT_LEVEL
};

const MojoKernels& active_kernels() {
  static const MojoKernels& kernels = *kTables[active_isa()];
  return kernels;
}

template <class P>
void run(void (*MojoKernels::*kernel)(const P*), const P& p) {
  check(p);
  (active_kernels().*kernel)(&p);
}

template <class P>
std::size_t workspace(int64_t (*MojoKernels::*function)(const P*), const P& p) {
  const P given = with_a_thread(p);
  return static_cast<std::size_t>((active_kernels().*function)(&given));
}

}  // namespace

bool takes(DType dtype) { return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16; }
const char* const kTakes = "the mojo backend takes float32, float64 and bfloat16";

#define VIT_OP(name, Params, ...) \
  void name(const Params& p) { run(&MojoKernels::name, p); }
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) \
  std::size_t name##_workspace(const Params& p) { return workspace(&MojoKernels::name##_workspace, p); }
#include "ops.def"

std::vector<std::pair<std::string, std::string>> info() {
  return {{"isa", active_level()},
          {"isa available", supported_levels()},
          {"threads", threads_runtime()},
          {"compiler", VIT_MOJO_VERSION}};
}

}  // namespace vit
