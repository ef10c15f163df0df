// Errors of the engine: a vit::Error with the vit_status that the C interface returns for it.
#pragma once

#include "vit.h"
#include "vit_engine.h"

namespace vit::engine {

inline constexpr vit_status kInvalid = VIT_INVALID, kFile = VIT_FILE, kUnsupported = VIT_UNSUPPORTED,
                            kMemory = VIT_MEMORY, kNotFinite = VIT_NOT_FINITE;

struct EngineError : Error {
  vit_status status;

  EngineError(vit_status status, const std::string& text) : Error(text), status(status) {}
};

[[noreturn]] inline void invalid(const std::string& text) { throw EngineError(kInvalid, "vit engine: " + text); }

}  // namespace vit::engine
