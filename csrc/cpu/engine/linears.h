// What stands between the rows of a pass and its products: norms, quantization, the linear layers in every precision.
// Columns of a product are those of the calling thread's part of the team.
#pragma once

#include "cpu/engine/pass.h"
#include "cpu/layer_norm.h"

namespace vit::VIT_ISA {

// This thread's columns of a[rows, K] weight^T for an epilogue.
template <class S, class T, class E>
void product(const Pass<T>& p, const void* a, int64_t rows, const Linear& w, const E& epilogue) {
  const int64_t panels = panels_of<S>(w.N);
  const Left left{static_cast<const char*>(a), w.K * static_cast<int64_t>(sizeof(S)), false};
  gemm_range<S, false>(left, w.weight, w.N, steps_of<S>(w.K), 0, rows, part(panels, p.team.column, p.team.columns),
                       part(panels, p.team.column + 1, p.team.columns), epilogue);
}

// The same for a compressed weight, panel by panel.
template <class T, class E>
void compressed_product(const Pass<T>& p, const void* a, int64_t rows, const Linear& w, const E& epilogue) {
  const int64_t panels = panels_of<bf16>(w.N), steps = steps_of<bf16>(w.K);
  const Left left{static_cast<const char*>(a), w.K * static_cast<int64_t>(sizeof(bf16)), false};
  const int64_t end = part(panels, p.team.column + 1, p.team.columns);
  for (int64_t panel = part(panels, p.team.column, p.team.columns); panel < end; ++panel) {
    with_code(w.precision, [&](auto code) { unpack_panel<decltype(code)>(w, panel, p.own.panel); });
    const int64_t first = panel * kTileColumns<bf16>, columns = min<int64_t>(w.N - first, kTileColumns<bf16>);
    gemm_range<bf16, false>(left, p.own.panel, columns, steps, 0, rows, 0, 1, [&](Tile<float> tile) {
      tile.column += first;
      epilogue(tile);
    });
  }
}

// y = activation(a weight^T + bias) + residual. Where the layer is quantized, a is in p.own.quantized.
template <Activation kActivation, class T, class O>
void linear(const Pass<T>& p, const T* a, int64_t rows, const Linear& w, const O* residual, O* y) {
  if constexpr (same<T, bf16>) {
    const Quantized& q = p.own.quantized;
    if (w.precision == Precision::int8)
      return product<q8>(p, q.bytes, rows, w,
                         QuantizedEpilogue<O, kActivation>{q.scales, w.scale, w.sums, w.bias, residual, y, w.N});
  }
  const Epilogue<T, O, kActivation, same<T, bf16>> epilogue{w.bias, residual, y, nullptr, w.N};
  if constexpr (same<T, bf16>) {
    if (stored(w.precision)) return compressed_product(p, a, rows, w, epilogue);
  }
  product<T>(p, a, rows, w, epilogue);
}

// Rows of x, normalised, as the layer `next` takes them: in p.own.normed or p.own.quantized.
template <class T>
void normalize(Pass<T>& p, const float* x, int64_t rows, const Norm& norm, const Linear& next) {
  const int64_t C = p.s.C;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * C;
    if (next.precision == Precision::int8) {
      norm_row(row, p.own.row, norm.weight, norm.bias, C, p.s.eps);
      p.own.quantized.scales[r] = quantize_row(p.own.row, C, p.own.quantized.bytes + r * C);
    } else {
      norm_row(row, p.own.normed + r * C, norm.weight, norm.bias, C, p.s.eps);
    }
  }
  p.clock.lap(Phase::norm);
}

// Rows of a, quantized where the layer `next` is.
template <class T>
void quantize(Pass<T>& p, const T* a, int64_t rows, const Linear& next) {
  if (next.precision != Precision::int8) return;
  for (int64_t r = 0; r < rows; ++r)
    p.own.quantized.scales[r] = quantize_row(a + r * next.K, next.K, p.own.quantized.bytes + r * next.K);
  p.clock.lap(Phase::quantize);
}

}  // namespace vit::VIT_ISA
