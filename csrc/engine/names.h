// The numbers of vit_engine.h by name, for callers in other languages.
#pragma once

#include "vit_engine.h"

namespace vit::engine {

// Entry number `index`; throws EngineError beyond the last.
vit_name name_at(int64_t index);

}  // namespace vit::engine
