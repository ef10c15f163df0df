// The functions of engine/executor.h on the CPU: those of the instruction-set level chosen for this machine.
#include "engine/executor.h"

#include <cstring>

#include "cpu/engine/kernels.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"

namespace vit {

#define VIT_LEVEL_TABLE(name)                \
  namespace name {                           \
  extern const EngineKernels engine_kernels; \
  }
VIT_CPU_LEVELS(VIT_LEVEL_TABLE)

namespace engine {
namespace {

const EngineKernels& find_kernels() {
#define VIT_LEVEL_OF_NAME(name) \
  if (!std::strcmp(active_level(), #name)) return name::engine_kernels;
  VIT_CPU_LEVELS(VIT_LEVEL_OF_NAME)
  throw Error("vit engine: no kernels for the instruction-set level " + std::string(active_level()));
}

const EngineKernels& kernels() {
  static const EngineKernels& found = find_kernels();
  return found;
}

}  // namespace

const char* level() { return active_level(); }

int64_t packed_bytes(const Linear& linear) { return kernels().packed_bytes(linear); }
void pack(const Packing& packing) { kernels().pack(packing); }
int64_t arena_bytes(const Network& network, int64_t B, int threads) {
  return kernels().arena_bytes(network, B, threads);
}
void run(const Forward& forward) { kernels().forward(forward); }

}  // namespace engine
}  // namespace vit
