// Argument checks of every backend: each throws vit::Error naming the op, the argument, its value.
#pragma once

#include "vit.h"

namespace vit {

// The dtypes a backend takes, and how its error texts list them: defined once by the backend.
bool takes(DType);
extern const char* const kTakes;

void check(const LayerNormFwd&);
void check(const LayerNormBwd&);
void check(const GeluFwd&);
void check(const GeluBwd&);
void check(const MatmulFwd&);
void check(const MatmulBwd&);
void check(const LinearFwd&);
void check(const LinearBwd&);
void check(const AttentionFwd&);
void check(const AttentionBwd&);

}  // namespace vit
