#include "attention.cuh"
namespace vit::cuda {
bool attention_bwd_short_supports(const AttentionBwd&) { return false; }
void attention_bwd_short(const AttentionBwd&) {}
}  // namespace vit::cuda
