// Argument checks of every backend: each throws vit::Error naming the op, the argument, its value.
#pragma once

#include "vit.h"

namespace vit {

// The dtypes a backend takes, and how its error texts list them: defined once by the backend.
bool takes(DType);
extern const char* const kTakes;

#define VIT_OP(name, Params, ...) void check(const Params&);
#define VIT_ROUTINE VIT_OP
#include "ops.def"

}  // namespace vit
