// linear_int8: y = scale activation(x weight^T + bias) + residual, x quantized row by row, exact sums of bytes.
//
//   x_scale = max |x| / 127,  q = x / x_scale rounded half to even,  x weight^T = (sum q weight) x_scale weight_scale
//
// Two launches: the rows of x to bytes, a warp each; the product on tensor cores (gemm_mma.cuh). 2 M N K operations;
// the first reads x twice, the second time from the cache, and writes M K bytes.
#include "gemm_mma.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;
constexpr float kLeast = 0x1p-100f;      // rows below it have the scale 1
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits of the float

// Bytes from row to row of q: whole copies of 16.
int64_t q_stride(int64_t K) { return divide_up(K, 16) * 16; }

__device__ inline int32_t warp_max(int32_t x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int32_t other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// q [M, stride] with zeros from column K on, and x_scale [M].
template <class T>
__global__ void __launch_bounds__(kBlock) quantize_rows(const T* __restrict__ x, int64_t x_stride, int8_t* q,
                                                        int64_t stride, float* x_scale, int64_t M, int64_t K) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / 32;
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
  const float largest = __int_as_float(most), scale = largest < kLeast ? 1.0f : largest / 127.0f;
  if (lane == 0) x_scale[row] = finite ? scale : __int_as_float(0x7fc00000);
  for (int64_t k = lane; k < stride; k += 32) {
    const float rounded = k < K && finite ? to_acc(in[k]) / scale + kRounder : kRounder;
    q[row * stride + k] = static_cast<int8_t>(__float_as_int(rounded) - __float_as_int(kRounder));
  }
}

// What happens to a sum: the scales of its row and column, then what follows any product.
template <class O>
struct IntegerEpilogue : Epilogue<O> {
  const float *x_scale, *weight_scale;

  template <int n>
  __device__ void apply(int64_t plane, int64_t row, int64_t column, float (&z)[n]) const {
    const float of_row = x_scale[row];
#pragma unroll
    for (int j = 0; j < n; ++j) z[j] *= of_row * weight_scale[column + j];
    Epilogue<O>::apply(plane, row, column, z);
  }
};

struct Buffers {
  int8_t* q;
  float* x_scale;
  std::size_t used;

  Buffers(const LinearInt8& p, void* base) {
    const std::size_t rows = aligned(static_cast<std::size_t>(p.M * q_stride(p.K)));
    q = static_cast<int8_t*>(base);
    x_scale = base ? reinterpret_cast<float*>(q + rows) : nullptr;
    used = rows + aligned(static_cast<std::size_t>(p.M) * sizeof(float));
  }
};

template <class O>
void multiply(const LinearInt8& p, const Buffers& buffers, const Launch& like) {
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
  const IntegerEpilogue<O> epilogue{Epilogue<O>(g), buffers.x_scale, static_cast<const float*>(p.weight_scale)};
  const Operand q = {buffers.q, q_stride(p.K), 1, 0}, weight = {p.weight, p.weight_stride, 1, 0};
  const bool vectors = p.weight_stride % 16 == 0 && is_aligned(p.weight);
  const auto go = [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    launch<gemm_mma_kernel<int8_t, kTile, true, true, IntegerEpilogue<O>>>(
        {like.op, like.shape, like.context, divide_up(p.M, kTile) * divide_up(p.N, kTile), kGemmThreads,
         static_cast<std::size_t>(mma_shared_bytes(kTile))},
        q, weight, int64_t{1}, p.K, p.K, true, vectors, epilogue);
  };
  if (mma_tile(p.M, p.N, 1) == 128) return go(std::integral_constant<int, 128>{});
  go(std::integral_constant<int, 64>{});
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

std::size_t linear_int8_workspace(const LinearInt8& p) { return cuda::Buffers(p, nullptr).used; }

void linear_int8(const LinearInt8& p) {
  using namespace cuda;
  const char* op = "linear_int8";
  check(p);
  if (p.M == 0 || p.N == 0) return;
  const DeviceGuard guard(op, p.context);
  const Launch like = {op, Shape({{"M", p.M}, {"N", p.N}, {"K", p.K}}), p.context, divide_up(p.M, kBlock / 32), kBlock};
  const Buffers buffers(p, p.workspace);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8)  // check has refused float64
      launch<quantize_rows<T>>(like, static_cast<const T*>(p.x), p.x_stride, buffers.q, q_stride(p.K), buffers.x_scale,
                               p.M, p.K);
  });
  dispatch(p.out_dtype, [&](auto element) {
    using O = decltype(element);
    if constexpr (sizeof(O) < 8) multiply<O>(p, buffers, like);
  });
}

}  // namespace vit
