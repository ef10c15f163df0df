// The kernel table of one instruction-set level.
#include "cpu/kernels.h"

namespace vit::VIT_ISA {

const Kernels kernels = {
    layer_norm_fwd,
    layer_norm_bwd,
    gelu_fwd,
    gelu_bwd,
    matmul_fwd,
    matmul_bwd,
    linear_fwd,
    linear_bwd,
    attention_fwd,
    attention_bwd,
    layer_norm_bwd_workspace,
    matmul_fwd_workspace,
    matmul_bwd_workspace,
    linear_fwd_workspace,
    linear_bwd_workspace,
    attention_fwd_workspace,
    attention_bwd_workspace,
};

}  // namespace vit::VIT_ISA
