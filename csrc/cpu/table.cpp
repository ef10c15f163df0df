// The kernel table of one instruction-set level.
#include "cpu/kernels.h"

namespace vit::VIT_ISA {

const Kernels kernels = {
#define VIT_OP(name, Params, ...) name,
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) name##_workspace,
#include "ops.def"
};

}  // namespace vit::VIT_ISA
