// The product of float32 operands rounded to TF32, see gemm_mma.cuh.
#include "gemm_mma.cuh"

void vit::cuda::gemm_tf32(const char* op, const Gemm& g, const Context& context) { gemm_mma<float>(op, g, context); }
