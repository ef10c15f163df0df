// The engine's kernel table of one instruction-set level.
#include "cpu/engine/kernels.h"

namespace vit::VIT_ISA {

const EngineKernels engine_kernels = {engine_packed_bytes, engine_pack, engine_arena_bytes, engine_forward};

}  // namespace vit::VIT_ISA
