// The kernel table of one instruction-set level.
#include "cpu/kernels.h"

namespace vit::VIT_ISA {

#ifdef VIT_ISA_PARTIAL
constexpr bool kPartial = true;
// What it does not compile is null in its table.
#define VIT_OP(name, Params, ...) __attribute__((weak)) void name(const Params&);
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) __attribute__((weak)) std::size_t name##_workspace(const Params&);
#include "ops.def"
#else
constexpr bool kPartial = false;
#endif

const Kernels kernels = {
    kPartial,
#define VIT_OP(name, Params, ...) name,
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) name##_workspace,
#include "ops.def"
};

}  // namespace vit::VIT_ISA
