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

// An area of a weight^T, a [rows, K] of S, for an epilogue.
template <class S, class E>
void packed_product(const Lhs& a, const Area& area, const Linear& w, const E& epilogue) {
  gemm_range<S, false>(a, w.weight, w.N, steps_of<S>(w.K), area.row_begin, area.row_end, area.panel_begin,
                       area.panel_end, epilogue);
}

// Of one panel of a product: moves its tiles to their columns, and for every tile asks for as much of the next panel's
// `bytes` as the tile has of the rows.
template <class E>
struct PanelEpilogue {
  const E& epilogue;
  const Area& area;
  int64_t column;
  const char* next;
  int64_t bytes;

  void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    epilogue.prefetch(row, rows, this->column + column, columns);
    const int64_t count = area.row_end - area.row_begin, begin = row - area.row_begin;
    for (int64_t at = bytes * begin / count; at < bytes * (begin + rows) / count; at += 64)
      __builtin_prefetch(next + at, 0, 2);
  }
  void operator()(Tile<float> tile) const {
    tile.column += column;
    epilogue(tile);
  }
};

// The same as packed_product for a weight of which unpack(w, panel, room) makes the operand; `column_bytes` of each.
template <class S, class U, class E>
void unpacked_product(const Lhs& a, const Area& area, const Linear& w, int64_t column_bytes, char* room,
                      const U& unpack, const E& epilogue) {
  for (int64_t panel = area.panel_begin; panel < area.panel_end; ++panel) {
    unpack(w, panel, room);
    const int64_t first = panel * kTileColumns<S>, end = min<int64_t>(first + kTileColumns<S>, w.N);
    const int64_t next = panel + 1 < area.panel_end ? min<int64_t>(w.N - end, kTileColumns<S>) : 0;
    gemm_range<S, false>(a, room, end - first, steps_of<S>(w.K), area.row_begin, area.row_end, 0, 1,
                         PanelEpilogue<E>{epilogue, area, first, w.weight + end * column_bytes, next * column_bytes});
  }
}

// The product in the precision of the weight, where that is a type of floats.
template <class T, class E>
void product(const Pass<T>& p, const Lhs& a, const Area& area, const Linear& w, const E& epilogue) {
  if constexpr (same<T, Operand<bf16>>) {
    if (stored(w.precision))
      return with_code(w.precision, [&](auto code) {
        using Code = decltype(code);
        unpacked_product<T>(a, area, w, compressed_column<Code>(w.K), p.own.panel, unpack_panel<Code>, epilogue);
      });
    if constexpr (!same<T, bf16>) {
      if (w.precision == Precision::bfloat16)
        return unpacked_product<T>(a, area, w, packed_b_bytes<bf16>(w.K, 1) / kWordLanes<bf16>, p.own.panel,
                                   widen_panel, epilogue);
    }
  }
  packed_product<T>(a, area, w, epilogue);
}

// Rows of `stride` elements, one after the other.
template <class T>
VIT_INLINE Lhs lhs_of(const T* a, int64_t stride) {
  return {reinterpret_cast<const char*>(a), stride * static_cast<int64_t>(sizeof(T)), false};
}

// An area of y = activation(a weight^T + bias) + residual. Where the layer is quantized, a is in p.own.quantized.
template <Activation kActivation, class T, class O>
void linear(const Pass<T>& p, const T* a, const Area& area, const Linear& w, const O* residual, O* y) {
  if constexpr (same<T, Operand<bf16>>) {
    static_assert(kTileColumns<q8> == kTileColumns<T>);  // an area is panels of either
    const Quantized& q = p.own.quantized;
    if (w.precision == Precision::int8)
      return packed_product<q8>({reinterpret_cast<const char*>(q.bytes), quantized_stride(w.K), false}, area, w,
                                QuantizedEpilogue<O, kActivation>{q.scales, w.scale, w.sums, w.bias, residual, y, w.N});
  }
  product(p, lhs_of(a, w.K), area, w, Epilogue<T, O, kActivation, same<T, bf16>>{w.bias, residual, y, nullptr, w.N});
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
