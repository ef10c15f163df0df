// adamw: one step of Adam with decoupled weight decay, in one pass over the parameters.
//
//   g = grad_scale grad,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   param = decay param - rate m / (sqrt(v) / root_correction + eps),  ema += (1 - ema_decay) (param - ema)
//
// What differs from step to step (rate, root_correction, ...) comes with the launch, or, where the step is part of a
// graph, from the device.
//
// A thread takes a number; where the averages have 8 bits a warp takes a block of 256, which share a scale, 32 at a
// time, so that accesses are adjacent. Memory bound: 28 bytes per float32 parameter, 16 with averages of 8 bits.
#include <cmath>

#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = static_cast<int>(kAdamWBlock);
constexpr int kCodes = 256;

// What is the same for all parameters of a call, in the type of the averages.
template <class A>
struct Settings {
  A decay, one_minus_beta1, beta2, one_minus_beta2, rate, eps, root_correction, grad_scale, one_minus_ema_decay;

  explicit Settings(const AdamW& p)
      : decay(static_cast<A>(1 - p.lr * p.weight_decay)),
        one_minus_beta1(static_cast<A>(1 - p.beta1)),
        beta2(static_cast<A>(p.beta2)),
        one_minus_beta2(static_cast<A>(1 - p.beta2)),
        rate(static_cast<A>(p.lr / p.correction1)),
        eps(static_cast<A>(p.eps)),
        root_correction(static_cast<A>(std::sqrt(p.correction2))),
        grad_scale(static_cast<A>(p.grad_scale)),
        one_minus_ema_decay(static_cast<A>(1 - p.ema_decay)) {}

  // AdamWCaptured::numbers, where there are any, instead of those of the launch.
  __device__ void take(const A* numbers) {
    if (!numbers) return;
    decay = numbers[0];
    rate = numbers[1];
    root_correction = numbers[2];
    grad_scale = numbers[3];
  }
};

// One parameter; m and v are moved along.
template <class A>
__device__ inline A step(const Settings<A>& s, A param, A grad, A& m, A& v, A& root) {
  const A g = grad * s.grad_scale;
  m += (g - m) * s.one_minus_beta1;
  v = v * s.beta2 + g * g * s.one_minus_beta2;
  root = sqrt(v);
  return param * s.decay - s.rate * (m / (root / s.root_correction + s.eps));
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    adamw(T* __restrict__ param, const T* __restrict__ grad, Acc<T>* __restrict__ exp_avg,
          Acc<T>* __restrict__ exp_avg_sq, Acc<T>* __restrict__ ema, int64_t n, Settings<Acc<T>> s,
          const Acc<T>* __restrict__ numbers) {
  using A = Acc<T>;
  s.take(numbers);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= n) return;
  A m = exp_avg[i], v = exp_avg_sq[i], root;
  const A moved = step(s, to_acc(param[i]), to_acc(grad[i]), m, v, root);
  exp_avg[i] = m;
  exp_avg_sq[i] = v;
  param[i] = from_acc<T>(moved);
  if (ema) ema[i] += (moved - ema[i]) * s.one_minus_ema_decay;
}

// A warp's share of a block of 256 numbers: number j * 32 + lane for j below kOwn.
constexpr int kOwn = kBlock / 32;
constexpr int kWarps = 4;

// The index of the value of the code that is nearest: how many edges, the middles between two values, are below x.
__device__ inline int nearest(const float* __restrict__ code, float x) {
  int index = 0;
#pragma unroll
  for (int step = kCodes / 2; step; step /= 2) {
    const int edge = index + step - 1;
    index += (code[edge] + code[edge + 1]) / 2 < x ? step : 0;
  }
  return index;
}

// The largest magnitude of a block, NaN when a number is not finite; known to every lane.
__device__ inline float block_scale(const float (&own)[kOwn]) {
  float largest = 0, not_finite = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    largest = fmaxf(largest, fabsf(own[j]));
    not_finite += own[j] - own[j];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
  return largest + warp_sum(not_finite);
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    adamw_8bit(AdamW p, Settings<float> s, const float* __restrict__ numbers) {
  s.take(numbers);
  const int lane = threadIdx.x % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, first = block * kBlock;
  if (first >= p.n) return;
  const float *code = static_cast<const float*>(p.code), *roots = code + kCodes;
  float* m_scale = static_cast<float*>(p.exp_avg_scale) + block;
  float* root_scale = static_cast<float*>(p.exp_avg_sq_scale) + block;
  uint8_t *m8 = static_cast<uint8_t*>(p.exp_avg) + first, *root8 = static_cast<uint8_t*>(p.exp_avg_sq) + first;
  T* param = static_cast<T*>(p.param) + first;
  const T* grad = static_cast<const T*>(p.grad) + first;
  float* ema = p.ema ? static_cast<float*>(p.ema) + first : nullptr;
  const int count = p.n - first < kBlock ? static_cast<int>(p.n - first) : kBlock;
  float m[kOwn], root[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = j * 32 + lane;
    m[j] = root[j] = 0;
    if (i >= count) continue;
    m[j] = code[m8[i]] * *m_scale;
    root[j] = roots[root8[i]] * *root_scale;
    float v = root[j] * root[j];
    const float moved = step(s, to_acc(param[i]), to_acc(grad[i]), m[j], v, root[j]);
    param[i] = from_acc<T>(moved);
    if (ema) ema[i] += (moved - ema[i]) * s.one_minus_ema_decay;
  }
  const float new_m_scale = block_scale(m), new_root_scale = block_scale(root);
  const float m_divisor = new_m_scale > 0 ? new_m_scale : 1, root_divisor = new_root_scale > 0 ? new_root_scale : 1;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = j * 32 + lane;
    if (i >= count) continue;
    const int index = nearest(roots, root[j] / root_divisor);
    m8[i] = static_cast<uint8_t>(nearest(code, m[j] / m_divisor));
    // A root that is not 0 does not become 0: it would be divided by.
    root8[i] = static_cast<uint8_t>(root[j] > 0 && index == 0 ? 1 : index);
  }
  if (lane == 0) *m_scale = new_m_scale, *root_scale = new_root_scale;
}

template <class T>
void run(const AdamW& p, const void* numbers) {
  using A = Acc<T>;
  const Shape shape({{"n", p.n}});
  const int64_t blocks = divide_up(p.n, kBlock);
  if constexpr (sizeof(A) == 4)
    if (p.exp_avg_scale)
      return launch<adamw_8bit<T>>({"adamw", shape, p.context, divide_up(blocks, kWarps), kWarps * 32}, p,
                                   Settings<float>(p), static_cast<const float*>(numbers));
  launch<adamw<T>>({"adamw", shape, p.context, blocks, kBlock}, static_cast<T*>(p.param), static_cast<const T*>(p.grad),
                   static_cast<A*>(p.exp_avg), static_cast<A*>(p.exp_avg_sq), static_cast<A*>(p.ema), p.n,
                   Settings<A>(p), static_cast<const A*>(numbers));
}

void launch_step(const AdamW& p, const void* numbers) {
  if (!p.n) return;
  const DeviceGuard guard("adamw", p.context);
  dispatch(p.dtype, [&](auto element) { run<decltype(element)>(p, numbers); });
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

void adamw(const AdamW& p) {
  check(p);
  cuda::launch_step(p, nullptr);
}

void adamw_captured(const AdamWCaptured& p) {
  check(p);
  AdamW same = {};  // lr and the corrections are in `numbers`
  same.param = p.param;
  same.grad = p.grad;
  same.exp_avg = p.exp_avg;
  same.exp_avg_sq = p.exp_avg_sq;
  same.exp_avg_scale = p.exp_avg_scale;
  same.exp_avg_sq_scale = p.exp_avg_sq_scale;
  same.ema = p.ema;
  same.code = p.code;
  same.n = p.n;
  same.beta1 = p.beta1;
  same.beta2 = p.beta2;
  same.eps = p.eps;
  same.correction1 = 1;
  same.ema_decay = p.ema_decay;
  same.dtype = p.dtype;
  same.context = p.context;
  cuda::launch_step(same, p.numbers);
}

}  // namespace vit
