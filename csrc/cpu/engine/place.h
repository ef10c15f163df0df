// Queries and keys on their way to attention: normalised by head, and turned by the place of their patch.
#pragma once

#include "cpu/engine/linears.h"
#include "cpu/rotary.h"

namespace vit::VIT_ISA {

// Whether anything stands between the projection and attention.
inline bool places(const Shape& s) { return s.qk_norm || s.rotary != Rotary::none; }

// The heads of one token, in place; the tokens before the patches have no place and are not turned. `tables`: those of
// the block.
template <class T>
VIT_INLINE void place_heads(const Shape& s, T* heads, const Norm& norm, const float* tables, int64_t token) {
  const int64_t D = s.D();
  const bool turns = s.rotary != Rotary::none && token >= s.prefix;
  for (int64_t h = 0; h < s.H; ++h) {
    T* head = heads + h * D;
    if (norm.weight) norm_one(s, norm, head, head, D);
    if (!turns) continue;
    const float* sin = tables + ((s.rotary_of_heads ? h * s.patches() : 0) + token - s.prefix) * 2 * D;
    if (s.rotary == Rotary::half)
      turn<T, float, true, false>(head, sin, sin + D, head, D);
    else
      turn<T, float, false, false>(head, sin, sin + D, head, D);
  }
}

// Rows [begin, end) of p.qkv in block l; with `of_token` only the first token of an image has queries.
template <class T>
void place(const Pass<T>& p, int64_t l, int64_t begin, int64_t end, bool of_token) {
  const Shape& s = p.s;
  const Block& w = p.net.blocks[l];
  const int64_t N = s.N(), C = s.C;
  const float* tables = p.net.rotary + (s.rotary_of_heads ? l * s.H * s.patches() * 2 * s.D() : 0);
  for (int64_t i = begin; i < end; ++i) {
    T* row = p.qkv + i * 3 * C;
    if (!of_token || i % N == 0) place_heads(s, row, w.q_norm, tables, i % N);
    place_heads(s, row + C, w.k_norm, tables, i % N);
  }
}

}  // namespace vit::VIT_ISA
