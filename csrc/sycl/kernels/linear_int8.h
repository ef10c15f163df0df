// linear_int8: y = scale activation(x weight^T + bias) + residual, x quantized row by row, exact sums of bytes.
//
//   x_scale = max |x| / 127,  q = x / x_scale rounded half to even,  x weight^T = (sum q weight) x_scale weight_scale
//
// Bytes are multiplied as floats, whose sums are exact up to 2^24: kExact products of two bytes, which are then added
// up as integers. On the CPU device a float multiply-add has as many products as the instruction for pairs of 16-bit
// integers and the addition behind it, and SYCL has no words for VNNI: as fast as linear in float32, no faster.
#pragma once

#include "epilogue.h"
#include "gemm.h"
#include "pack.h"

inline constexpr int kExact = 1024;         // 1024 * 127 * 127 < 2^24
inline constexpr float kLeast = 0x1p-100f;  // rows below it have the scale 1

// x / divisor as IEEE 754 rounds it, whatever division the device has: one step of Newton's from the remainder.
VIT_INLINE float divide(float x, float divisor) {
  const float q = x / divisor;
  return sycl::fma(sycl::fma(-q, divisor, x), 1.0f / divisor, q);
}

// q [M, K] of x [M, K] as whole floats, and the scale of each row. A sub-group takes `rows` rows.
template <class T>
VIT_KERNEL quantize_rows(const T* x, float* q, float* x_scale, int M, int K, int64 x_row, int rows) {
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * rows, stop = first + rows < M ? first + rows : M;
  const auto group = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_sub_group();
  for (int64 row = first; row < stop; ++row) {
    const T* in = x + row * x_row;
    float* out = q + row * K;
    int most = 0;  // of |x| as integers, which sort as floats do, infinities and NaN last
    for_columns(K, lane, [&](int k) VIT_ALWAYS {
      const int bits = sycl::bit_cast<int>(load<float>(in + k + lane)) & 0x7fffffff;
      most = bits > most ? bits : most;
    });
    most = sycl::reduce_over_group(group, most, sycl::maximum<int>());
    const bool finite = most < 0x7f800000;
    const float largest = sycl::bit_cast<float>(most), scale = largest < kLeast ? 1.0f : divide(largest, 127.0f);
    for_columns(K, lane, [&](int k) VIT_ALWAYS {
      out[k + lane] = finite ? sycl::rint(divide(load<float>(in + k + lane), scale)) : 0.0f;
    });
    if (lane == 0) x_scale[row] = finite ? scale : sycl::bit_cast<float>(0x7fc00000);
  }
}

template <class O>
VIT_KERNEL linear_int8(const float* q, const float* packed, const float* x_scale, const float* weight_scale,
                       const float* bias, const float* scale, const O* residual, O* y, int M, int N, int K,
                       Activation activation, int64 units) {
  multiply<float, kExact>(q, packed, {M, N, K, K, 0, 0}, units,
                          [=](int64, int row, int column, int lane, int sum) VIT_ALWAYS {
                            const float* w = weight_scale + column;
                            epilogue(float(sum) * (x_scale[row] * w[lane]), int64(row) * N + column, column, lane, bias,
                                     scale, residual, y, static_cast<O*>(nullptr), activation);
                          });
}
