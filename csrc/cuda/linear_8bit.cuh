// linear_int8 and linear_fp8: y = scale activation(x weight^T + bias) + residual, x quantized row by row.
//
//   x_scale = max |x| / L,  q = x / x_scale rounded half to even,  x weight^T = (sum q weight) x_scale weight_scale
//
// Two launches: the rows of x to bytes, a warp each; the product on tensor cores (gemm_mma.cuh). 2 M N K operations;
// the first reads x twice, the second time from the cache, and writes M K bytes. A file each, for e4m3 is compiled for
// newer GPUs alone: it names its numbers by a struct with
//   Element        the type of q and weight
//   kLargest       L
//   nearest(x)     the Element of a float within +-L, or one rounding beyond
#pragma once

#include "gemm_mma.cuh"
#include "reduce.cuh"

namespace vit::cuda {

inline constexpr int kQuantizeBlock = 256;
inline constexpr float kLeastScaled = 0x1p-100f;  // rows below it have the scale 1

// Bytes from row to row of q: whole copies of 16.
inline int64_t q_stride(int64_t K) { return divide_up(K, 16) * 16; }

// q [M, stride] with zeros from column K on, and x_scale [M].
template <class T, class Format>
__global__ void __launch_bounds__(kQuantizeBlock)
    quantize_rows(const T* __restrict__ x, int64_t x_stride, typename Format::Element* q, int64_t stride,
                  float* x_scale, int64_t M, int64_t K) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kQuantizeBlock + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= M) return;
  const T* in = x + row * x_stride;
  int32_t most = 0;  // of |x| as integers, which sort as floats do, infinities and NaN last
  for (int64_t k = lane; k < K; k += 32) {
    const int32_t bits = __float_as_int(to_acc(in[k])) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  most = warp_max(most);
  const bool finite = most < 0x7f800000;
  const float largest = __int_as_float(most), scale = largest < kLeastScaled ? 1.0f : largest / Format::kLargest;
  if (lane == 0) x_scale[row] = finite ? scale : __int_as_float(0x7fc00000);
  for (int64_t k = lane; k < stride; k += 32)
    q[row * stride + k] = Format::nearest(k < K && finite ? to_acc(in[k]) / scale : 0.0f);
}

// What happens to a sum: the scales of its row and column, then what follows any product.
template <class O>
struct ScaledEpilogue : Epilogue<O> {
  const float *x_scale, *weight_scale;

  template <int n>
  __device__ void apply(int64_t plane, int64_t row, int64_t column, float (&z)[n]) const {
    const float of_row = x_scale[row];
#pragma unroll
    for (int j = 0; j < n; ++j) z[j] *= of_row * weight_scale[column + j];
    Epilogue<O>::apply(plane, row, column, z);
  }
};

// The workspace: q and x_scale.
struct QuantizedRows {
  void* q;
  float* x_scale;
  std::size_t used;

  QuantizedRows(const Linear8Bit& p, void* base) {
    const std::size_t bytes = aligned(static_cast<std::size_t>(p.M * q_stride(p.K)));
    q = base;
    x_scale = base ? reinterpret_cast<float*>(static_cast<char*>(base) + bytes) : nullptr;
    used = bytes + aligned(static_cast<std::size_t>(p.M) * sizeof(float));
  }
};

template <class Format, class O>
void multiply(const Linear8Bit& p, const QuantizedRows& rows, const Launch& like) {
  using Element = typename Format::Element;
  Gemm g;  // what the epilogue reads of it
  g.M = p.M;
  g.N = p.N;
  g.bias = p.bias;
  g.bias_dtype = DType::float32;
  g.activation = p.activation;
  g.scale = p.scale;
  g.residual = p.residual;
  g.out = p.y;
  g.out_dtype = g.dtype = p.out_dtype;
  const ScaledEpilogue<O> epilogue{Epilogue<O>(g), rows.x_scale, static_cast<const float*>(p.weight_scale)};
  const Operand q = {rows.q, q_stride(p.K), 1, 0}, weight = {p.weight, p.weight_stride, 1, 0};
  const bool vectors = p.weight_stride % 16 == 0 && is_aligned(p.weight);
  const auto go = [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    launch<gemm_mma_kernel<Element, kTile, true, true, ScaledEpilogue<O>>>(
        {like.op, like.shape, like.context, divide_up(p.M, kTile) * divide_up(p.N, kTile), kGemmThreads,
         static_cast<std::size_t>(mma_shared_bytes(kTile))},
        q, weight, int64_t{1}, p.K, p.K, true, vectors, epilogue);
  };
  if (mma_tile(p.M, p.N, 1) == 128) return go(std::integral_constant<int, 128>{});
  go(std::integral_constant<int, 64>{});
}

// Both launches, of arguments that were checked.
template <class Format>
void linear_8bit(const char* op, const Linear8Bit& p) {
  using Element = typename Format::Element;
  const Launch like = {op, Shape({{"M", p.M}, {"N", p.N}, {"K", p.K}}), p.context, divide_up(p.M, kQuantizeBlock / 32),
                       kQuantizeBlock};
  const QuantizedRows rows(p, p.workspace);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8)  // check has refused float64
      launch<quantize_rows<T, Format>>(like, static_cast<const T*>(p.x), p.x_stride, static_cast<Element*>(rows.q),
                                       q_stride(p.K), rows.x_scale, p.M, p.K);
  });
  dispatch(p.out_dtype, [&](auto element) {
    using O = decltype(element);
    if constexpr (sizeof(O) < 8) multiply<Format, O>(p, rows, like);
  });
}

}  // namespace vit::cuda
