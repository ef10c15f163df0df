// The family of kernels that vit::info() tries the run-time compiler on.
#pragma once

#include "runtime.h"

namespace vit::device {

extern const Family kLayerNormForward;

}  // namespace vit::device
