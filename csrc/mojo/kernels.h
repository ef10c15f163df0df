// The functions that the kernels of one instruction-set level export (exports.mojo.in), and the table through
// which dispatch.cpp reaches them.
#pragma once

#include "vit.h"

namespace vit {

struct MojoKernels {
#define VIT_OP(name, Params, ...) void (*name)(const Params*);
#define VIT_ROUTINE VIT_OP
#define VIT_GPU(...)
#define VIT_WORKSPACE(name, Params) int64_t (*name##_workspace)(const Params*);
#include "ops.def"
};

// The other half of check_layout in kernels/contract.mojo.
static_assert(sizeof(Context) == 24);
static_assert(sizeof(LayerNormFwd) == 112);
static_assert(sizeof(LayerNormBwd) == 128);
static_assert(sizeof(RmsNormFwd) == 96);
static_assert(sizeof(RmsNormBwd) == 112);
static_assert(sizeof(GeluFwd) == 56);
static_assert(sizeof(GeluBwd) == 64);
static_assert(sizeof(SwigluFwd) == 88);
static_assert(sizeof(SwigluBwd) == 120);
static_assert(sizeof(MatmulFwd) == 144);
static_assert(sizeof(MatmulBwd) == 160);
static_assert(sizeof(LinearFwd) == 144);
static_assert(sizeof(LinearBwd) == 160);
static_assert(sizeof(RotaryFwd) == 176);
static_assert(sizeof(RotaryBwd) == 232);
static_assert(sizeof(AttentionFwd) == 200);
static_assert(sizeof(AttentionBwd) == 304);
static_assert(sizeof(AttentionRows) == 200);
static_assert(sizeof(Move) == 288);
static_assert(sizeof(LinearInt8) == 144);
static_assert(sizeof(AdamW) == 176);

}  // namespace vit
