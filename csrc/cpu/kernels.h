// The functions one instruction-set level provides, and the table through which dispatch.cpp reaches them.
//
// Rule for every file compiled per level (VIT_ISA defined): all code lives in namespace vit::VIT_ISA, and no inline
// function or template of another namespace (std:: included) may be emitted. The linker keeps one copy of each such
// function for the whole library, possibly the AVX-512 one, which then crashes on a smaller CPU. For the same reason
// there are no initialisers that run at load time.
#pragma once

#include "vit.h"

namespace vit {

struct Kernels {
  void (*layer_norm_fwd)(const LayerNormFwd&);
  void (*layer_norm_bwd)(const LayerNormBwd&);
  void (*gelu_fwd)(const GeluFwd&);
  void (*gelu_bwd)(const GeluBwd&);
  void (*matmul_fwd)(const MatmulFwd&);
  void (*matmul_bwd)(const MatmulBwd&);
  void (*linear_fwd)(const LinearFwd&);
  void (*linear_bwd)(const LinearBwd&);
  void (*attention_fwd)(const AttentionFwd&);
  void (*attention_bwd)(const AttentionBwd&);
  std::size_t (*layer_norm_bwd_workspace)(const LayerNormBwd&);
  std::size_t (*matmul_fwd_workspace)(const MatmulFwd&);
  std::size_t (*matmul_bwd_workspace)(const MatmulBwd&);
  std::size_t (*linear_fwd_workspace)(const LinearFwd&);
  std::size_t (*linear_bwd_workspace)(const LinearBwd&);
  std::size_t (*attention_fwd_workspace)(const AttentionFwd&);
  std::size_t (*attention_bwd_workspace)(const AttentionBwd&);
};

// The kernels in use on this machine, and the name of their level.
const Kernels& active_kernels();
const char* active_level();

#ifdef VIT_ISA
namespace VIT_ISA {

void layer_norm_fwd(const LayerNormFwd&);
void layer_norm_bwd(const LayerNormBwd&);
void gelu_fwd(const GeluFwd&);
void gelu_bwd(const GeluBwd&);
void matmul_fwd(const MatmulFwd&);
void matmul_bwd(const MatmulBwd&);
void linear_fwd(const LinearFwd&);
void linear_bwd(const LinearBwd&);
void attention_fwd(const AttentionFwd&);
void attention_bwd(const AttentionBwd&);
std::size_t layer_norm_bwd_workspace(const LayerNormBwd&);
std::size_t matmul_fwd_workspace(const MatmulFwd&);
std::size_t matmul_bwd_workspace(const MatmulBwd&);
std::size_t linear_fwd_workspace(const LinearFwd&);
std::size_t linear_bwd_workspace(const LinearBwd&);
std::size_t attention_fwd_workspace(const AttentionFwd&);
std::size_t attention_bwd_workspace(const AttentionBwd&);

extern const Kernels kernels;

}  // namespace VIT_ISA
#endif

}  // namespace vit
