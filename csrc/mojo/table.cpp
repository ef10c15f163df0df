// The kernel table of one instruction-set level (-DVIT_LEVEL=...).
#include "mojo/kernels.h"

#define VIT_JOIN(level, name) vit_mojo_##level##_##name
#define VIT_NAME(level, name) VIT_JOIN(level, name)

namespace vit {

extern "C" {
#define VIT_OP(name, Params, ...) void VIT_NAME(VIT_LEVEL, name)(const Params*);
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) int64_t VIT_NAME(VIT_LEVEL, name##_workspace)(const Params*);
#include "ops.def"
}

namespace VIT_LEVEL {

extern const MojoKernels kernels;
const MojoKernels kernels = {
#define VIT_OP(name, Params, ...) VIT_NAME(VIT_LEVEL, name),
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) VIT_NAME(VIT_LEVEL, name##_workspace),
#include "ops.def"
};

}  // namespace VIT_LEVEL
}  // namespace vit
