// The engine's functions of one instruction-set level, and the table through which executor.cpp reaches them. The rule
// of cpu/kernels.h for files compiled per level holds here, too.
#pragma once

#include "engine/network.h"

namespace vit {

struct EngineKernels {
  int64_t (*packed_bytes)(const engine::Linear&);
  void (*pack)(const engine::Packing&);
  int64_t (*arena_bytes)(const engine::Network&, int64_t B, int threads);
  void (*forward)(const engine::Forward&);
};

#ifdef VIT_ISA
namespace VIT_ISA {

int64_t engine_packed_bytes(const engine::Linear&);
void engine_pack(const engine::Packing&);
int64_t engine_arena_bytes(const engine::Network&, int64_t B, int threads);
void engine_forward(const engine::Forward&);

extern const EngineKernels engine_kernels;

}  // namespace VIT_ISA
#endif

}  // namespace vit
