// attention: checks, the choice of a kernel, and delta of the backward.
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;

// delta[b, h, n] = sum over d of dout[b, n, h, d] out[b, n, h, d]: one warp per query, dout and out read once. In TF32
// dout is rounded as in dp = dout v^T, so that ds = p (dp - delta) vanishes where it should: with one key, dp is delta.
template <class T>
__global__ void __launch_bounds__(kBlock)
    attention_delta(const T* __restrict__ dout, const T* __restrict__ out, Acc<T>* __restrict__ delta, int64_t B,
                    int64_t N, int64_t H, int D, bool tf32) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;  // (b, n, h)
  if (row >= B * N * H) return;
  Acc<T> sum = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    Acc<T> g = to_acc(dout[row * D + d]);
    if constexpr (std::is_same_v<T, float>) g = tf32 ? tf32_to_float(float_to_tf32(g)) : g;
    sum += g * to_acc(out[row * D + d]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[(row / (N * H) * H + row % H) * N + row / H % N] = sum;
}

bool on_tensor_cores(DType dtype, int64_t D, const Context& context) {
  return is_16_bit(dtype) || (dtype == DType::float32 && context.allow_tf32 && D <= kMaxHeadDimTF32);
}

// What this backend takes of what vit.h allows.
void check_limits(const char* op, int64_t B, int64_t N, int64_t L, int64_t H, int64_t D) {
  if (B > 0 && N > 0 && H > 0) require(L >= 1, op, "at least one key is needed, L is 0");
  if (D < 1 || D > 256) fail(op, "head dimension " + std::to_string(D) + " is not within 1..256");
}

// Shared memory that a block needs for heads of D, whatever the number of tokens: of the kernel that a call cannot do
// without. The kernels for short sequences are chosen only where they fit; those of 16 bits and TF32 fit everywhere.
std::size_t needed_bytes(DType dtype, int64_t D, bool backward) {
  return is_16_bit(dtype) ? 0 : attention_scalar_bytes(dtype, D, backward);
}

}  // namespace

Shape attention_shape(int64_t B, int64_t N, int64_t L, int64_t H, int64_t D) {
  return Shape({{"B", B}, {"N", N}, {"L", L}, {"H", H}, {"D", D}});
}

}  // namespace vit::cuda

// For python/vit/backends/cuda.py, which finds it with ctypes: what of an op may exceed a device. All other kernels fit
// in the least that a GPU has (kLeastShared), which is asserted where they are.
extern "C" __attribute__((visibility("default"))) int vit_cuda_attention_shared(int dtype, int D, int backward) {
  return static_cast<int>(vit::cuda::needed_bytes(static_cast<vit::DType>(dtype), D, backward != 0));
}

namespace vit {

std::size_t attention_fwd_workspace(const AttentionFwd&) { return 0; }

std::size_t attention_bwd_workspace(const AttentionBwd& p) {
  const std::size_t acc = p.dtype == DType::float64 ? 8 : 4;
  return cuda::aligned(static_cast<std::size_t>(p.B * p.H * p.N) * acc);
}

void attention_fwd(const AttentionFwd& p) {
  using namespace cuda;
  const char* op = "attention_fwd";
  check(p);
  check_limits(op, p.B, p.N, p.L, p.H, p.D);
  if (p.B * p.N * p.H == 0) return;
  const DeviceGuard guard(op, p.context);
  if (!on_tensor_cores(p.dtype, p.D, p.context)) return attention_fwd_scalar(p);
  if (attention_fwd_hopper_supports(p)) return attention_fwd_hopper(p);
  if (attention_fwd_short_supports(p)) return attention_fwd_short(p);
  attention_fwd_mma(p);
}

void attention_bwd(const AttentionBwd& p) {
  using namespace cuda;
  const char* op = "attention_bwd";
  check(p);
  check_limits(op, p.B, p.N, p.L, p.H, p.D);
  if (p.B * p.H == 0 || (p.N == 0 && p.L == 0)) return;
  const DeviceGuard guard(op, p.context);
  if (attention_bwd_hopper_supports(p)) return attention_bwd_hopper(p);
  if (attention_bwd_short_supports(p)) return attention_bwd_short(p);
  const bool tensor_cores = on_tensor_cores(p.dtype, p.D, p.context);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = p.B * p.N * p.H;
    launch<attention_delta<T>>(
        {op, attention_shape(p.B, p.N, p.L, p.H, p.D), p.context, divide_up(rows, kBlock / 32), kBlock},
        static_cast<const T*>(p.dout), static_cast<const T*>(p.out), static_cast<Acc<T>*>(p.workspace), p.B, p.N, p.H,
        static_cast<int>(p.D), tensor_cores);
  });
  if (!tensor_cores) return attention_bwd_scalar(p, p.workspace);
  attention_bwd_mma(p, static_cast<const float*>(p.workspace));
}

}  // namespace vit
