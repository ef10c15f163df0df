// Calls of the runtime that may fail without harm, and functions of the driver. The runtime is declared before it.
#pragma once

#include <atomic>

namespace vit::cuda {

// Whether a call of the runtime went well. The runtime keeps an error for whoever asks next, and that must not be the
// next call of PyTorch: what fails here is told here, or has an answer that stands for it.
inline bool went_well(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// A function of the driver, through the runtime: the module does not link to the driver. `known` keeps it once it was
// found; null where there is none now.
inline void* driver_function(const char* name, unsigned version, std::atomic<void*>& known) {
  void* function = known.load(std::memory_order_acquire);
  if (function) return function;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (!went_well(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result)) ||
      result != cudaDriverEntryPointSuccess)
    return nullptr;
  known.store(function, std::memory_order_release);
  return function;
}

}  // namespace vit::cuda
