// What stands between the two layers of an MLP besides an activation in the first one's epilogue: gates and a norm.
#pragma once

#include "cpu/engine/linears.h"

namespace vit::VIT_ISA {

// out = activation(gate) value, `width` of each.
template <Activation kActivation, class T, class O>
VIT_INLINE void gate_row(const T* gate, const T* value, int64_t width, O* out) {
  for (int64_t j = 0; j < width; j += kLanes<float>) {
    const int64_t n = width - j;
    store<float>(out + j, activate<T, kActivation, same<T, bf16>>(load<float>(gate + j, n)) * load<float>(value + j, n),
                 n);
  }
}

// Rows [begin, end) of what fc1 has made, as fc2 reads them.
template <class T>
void inner_rows(const Pass<T>& p, const Block& w, Activation activation, int64_t begin, int64_t end) {
  const int64_t made = w.fc1.N, width = w.fc2.K;
  with_activation(activation, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    for (int64_t r = begin; r < end; ++r) {
      const T* row = p.shared_hidden + r * made;
      T* out = p.shared_inner + r * width;
      if (made == width) {
        norm_one(p.s, w.mlp_norm, row, out, width);
      } else if (w.mlp_norm.weight) {
        gate_row<kActivation>(row, row + width, width, p.own.row);
        norm_one(p.s, w.mlp_norm, p.own.row, out, width);
      } else {
        gate_row<kActivation>(row, row + width, width, out);
      }
    }
  });
}

// p.own.normed or p.own.quantized -> what fc2 reads, [rows, w.fc2.K]. The threads that share rows share the result.
template <class T>
const T* hidden_of(Pass<T>& p, const Block& w, Activation activation, int64_t rows) {
  const bool gated = w.fc1.N != w.fc2.K;
  with_activation(gated ? Activation::none : activation, [&](auto constant) {
    linear<decltype(constant)::value, T, T>(p, p.own.normed, rows, w.fc1, nullptr, p.shared_hidden);
  });
  p.clock.lap(Phase::fc1);
  p.meet_columns();
  if (!gated && !w.mlp_norm.weight) return p.shared_hidden;
  const Team& team = p.team;
  inner_rows(p, w, activation, part(rows, team.column, team.columns), part(rows, team.column + 1, team.columns));
  p.clock.lap(Phase::gate);
  p.meet_columns();
  return p.shared_inner;
}

}  // namespace vit::VIT_ISA
