#include "gemm.cuh"
namespace vit::cuda {
bool gemm_hopper_supports(const Gemm&, const Context&) { return false; }
void gemm_hopper(const char*, const Gemm&, const Context&) {}
}
