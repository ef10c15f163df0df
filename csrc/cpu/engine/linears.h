// What stands between the rows of a pass and its products: norms, quantization, the linear layers in every precision.
// Columns of a product are those of the calling thread's part of the team.
#pragma once

#include "cpu/engine/pass.h"
#include "cpu/rms_norm.h"

namespace vit::VIT_ISA {

// A part of a product: rows of a and panels of the weight.
struct Area {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// Panels [begin, end) of a product divided among the threads that share the rows.
template <class T>
Area share_of(const Pass<T>& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  const Team& team = p.team;
  return {row_begin, row_end, begin + part(end - begin, team.column, team.columns),
          begin + part(end - begin, team.column + 1, team.columns)};
}

// An area of a weight^T, a [rows, K], for an epilogue.
template <class S, class E>
void product(const void* a, const Area& area, const Linear& w, const E& epilogue) {
  const int64_t stride = same<S, q8> ? quantized_stride(w.K) : w.K * static_cast<int64_t>(sizeof(S));
  const Lhs lhs{static_cast<const char*>(a), stride, false};
  gemm_range<S, false>(lhs, w.weight, w.N, steps_of<S>(w.K), area.row_begin, area.row_end, area.panel_begin,
                       area.panel_end, epilogue);
}

// The same for a compressed weight, unpacked panel by panel to `room`.
template <class E>
void compressed_product(const void* a, const Area& area, const Linear& w, char* room, const E& epilogue) {
  const int64_t steps = steps_of<bf16>(w.K);
  const Lhs lhs{static_cast<const char*>(a), w.K * static_cast<int64_t>(sizeof(bf16)), false};
  for (int64_t panel = area.panel_begin; panel < area.panel_end; ++panel) {
    with_code(w.precision, [&](auto code) { unpack_panel<decltype(code)>(w, panel, room); });
    const int64_t first = panel * kTileColumns<bf16>, columns = min<int64_t>(w.N - first, kTileColumns<bf16>);
    gemm_range<bf16, false>(lhs, room, columns, steps, area.row_begin, area.row_end, 0, 1, [&](Tile<float> tile) {
      tile.column += first;
      epilogue(tile);
    });
  }
}

// An area of y = activation(a weight^T + bias) + residual. Where the layer is quantized, a is in p.own.quantized.
template <Activation kActivation, class T, class O>
void linear(const Pass<T>& p, const T* a, const Area& area, const Linear& w, const O* residual, O* y) {
  if constexpr (same<T, bf16>) {
    const Quantized& q = p.own.quantized;
    if (w.precision == Precision::int8)
      return product<q8>(q.bytes, area, w,
                         QuantizedEpilogue<O, kActivation>{q.scales, w.scale, w.sums, w.bias, residual, y, w.N});
  }
  const Epilogue<T, O, kActivation, same<T, bf16>> epilogue{w.bias, residual, y, nullptr, w.N};
  if constexpr (same<T, bf16>) {
    if (stored(w.precision)) return compressed_product(a, area, w, p.own.panel, epilogue);
  }
  product<T>(a, area, w, epilogue);
}

// This thread's columns of all of it.
template <Activation kActivation, class T, class O>
void linear(const Pass<T>& p, const T* a, int64_t rows, const Linear& w, const O* residual, O* y) {
  linear<kActivation>(p, a, share_of(p, 0, rows, 0, panels_of<T>(w.N)), w, residual, y);
}

// Calls f(j, n) for every vector of a row of C values.
template <class F>
VIT_INLINE void for_vectors(int64_t C, const F& f) {
  for (int64_t j = 0; j < C; j += kLanes<float>) f(j, C - j);
}

// y = y + scale x
VIT_INLINE void add_row(float scale, const float* x, float* y, int64_t C) {
  for_vectors(C, [&](int64_t j, int64_t n) {
    store<float>(y + j, fma(broadcast(scale), load<float>(x + j, n), load<float>(y + j, n)), n);
  });
}

// One row of `width` values, normalised; y may be x.
template <class X, class Y>
VIT_INLINE void norm_one(const Shape& s, const Norm& norm, const X* x, Y* y, int64_t width) {
  if (s.norm == NormKind::layer) {
    norm_row(x, y, norm.weight, norm.bias, width, s.eps);
  } else {
    Acc<X> rstd[1];
    rms_norm_rows<1>(x, 0, y, 0, norm.weight, width, s.eps, rstd);
  }
}

// Rows of x [rows, C], normalised, as the layer `next` takes them: in p.own.normed or p.own.quantized.
template <class T, class X>
void normalize(Pass<T>& p, const X* x, int64_t rows, const Norm& norm, const Linear& next) {
  const int64_t C = p.s.C;
  for (int64_t r = 0; r < rows; ++r) {
    const X* row = x + r * C;
    if (next.precision == Precision::int8) {
      norm_one(p.s, norm, row, p.own.row, C);
      p.own.quantized.scales[r] =
          quantize_row(p.own.row, C, next.zero, p.own.quantized.bytes + r * quantized_stride(C));
    } else {
      norm_one(p.s, norm, row, p.own.normed + r * C, C);
    }
  }
  p.clock.lap(Phase::norm);
}

// Rows of a, quantized where the layer `next` is.
template <class T>
void quantize(Pass<T>& p, const T* a, int64_t rows, const Linear& next) {
  if (next.precision != Precision::int8) return;
  for (int64_t r = 0; r < rows; ++r)
    p.own.quantized.scales[r] =
        quantize_row(a + r * next.K, next.K, next.zero, p.own.quantized.bytes + r * quantized_stride(next.K));
  p.clock.lap(Phase::quantize);
}

}  // namespace vit::VIT_ISA
