// The functions one instruction-set level provides, and the table through which dispatch.cpp reaches them.
//
// Rule for every file compiled per level (VIT_ISA defined): all code lives in namespace vit::VIT_ISA, and no inline
// function or template of another namespace (std:: included) may be emitted. The linker keeps one copy of each such
// function for the whole library, possibly the AVX-512 one, which then crashes on a smaller CPU. For the same reason
// there are no initialisers that run at load time.
#pragma once

#include "vit.h"

namespace vit {

struct Kernels {
  bool partial;  // has what its instructions change, for bfloat16 and int8 alone; the rest is that of the level before
#define VIT_OP(name, Params, ...) void (*name)(const Params&);
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) std::size_t (*name##_workspace)(const Params&);
#include "ops.def"
};

#ifdef VIT_ISA
namespace VIT_ISA {

#define VIT_OP(name, Params, ...) void name(const Params&);
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) std::size_t name##_workspace(const Params&);
#include "ops.def"

extern const Kernels kernels;

}  // namespace VIT_ISA
#endif

}  // namespace vit
