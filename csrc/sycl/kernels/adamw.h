// adamw: one step of Adam with decoupled weight decay, in one pass over the parameters.
//
//   g = grad_scale grad,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   param = decay param - rate m / (sqrt(v) / root_correction + eps),  ema += (1 - ema_decay) (param - ema)
//
// A sub-group walks over kElements numbers in blocks of 256, which share a scale where the averages have 8 bits. Memory
// bound: 28 bytes per float32 parameter, 16 with averages of 8 bits.
#pragma once

#include "common.h"

inline constexpr int kAdamWBlock = 256;
inline constexpr int kAdamWCodes = 256;
inline constexpr int kAdamWOwn = kAdamWBlock / VIT_LANES;  // numbers of a block that a lane has

// What is the same for all parameters of a call, in the type of the averages. A kernel takes the numbers one by one: a
// struct among its arguments ended in a segmentation fault (run-time library of 2026.0, CPU device).
template <class A>
struct AdamWSettings {
  A decay, one_minus_beta1, beta2, one_minus_beta2, rate, eps, root_correction, grad_scale, one_minus_ema_decay;
};

// One parameter; m and v are moved along.
template <class A>
VIT_INLINE A adamw_step(const AdamWSettings<A>& s, A param, A grad, A& m, A& v, A& root) {
  const A g = grad * s.grad_scale;
  m = sycl::fma(g - m, s.one_minus_beta1, m);
  v = sycl::fma(g * g, s.one_minus_beta2, v * s.beta2);
  root = sycl::sqrt(v);
  return sycl::fma(-s.rate, m / (root / s.root_correction + s.eps), param * s.decay);
}

template <class T>
VIT_KERNEL adamw(T* param, const T* grad, Acc<T>* exp_avg, Acc<T>* exp_avg_sq, Acc<T>* ema, int64 n, Acc<T> decay,
                 Acc<T> one_minus_beta1, Acc<T> beta2, Acc<T> one_minus_beta2, Acc<T> rate, Acc<T> eps,
                 Acc<T> root_correction, Acc<T> grad_scale, Acc<T> one_minus_ema_decay) {
  using A = Acc<T>;
  const AdamWSettings<A> s = {decay, one_minus_beta1, beta2,      one_minus_beta2,    rate,
                              eps,   root_correction, grad_scale, one_minus_ema_decay};
  const Place at = place();
  const int64 first = at.unit * vit::tiles::kElements;
  if (first >= n) return;
  const int lane = at.lane, count = n - first < vit::tiles::kElements ? int(n - first) : vit::tiles::kElements;
  for_columns(count, lane, [&](int c) VIT_ALWAYS {
    const int64 i = first + c;
    A m = exp_avg[i + lane], v = exp_avg_sq[i + lane], root;
    const A moved = adamw_step(s, load<A>(param + i + lane), load<A>(grad + i + lane), m, v, root);
    exp_avg[i + lane] = m;
    exp_avg_sq[i + lane] = v;
    store(param + i + lane, moved);
    if (ema) ema[i + lane] += (moved - ema[i + lane]) * s.one_minus_ema_decay;
  });
}

// The index of the value of the code that is nearest: how many edges, the middles between two values, are below x.
VIT_INLINE int nearest(const float* code, float x) {
  int index = 0;
  VIT_UNROLL for (int step = kAdamWCodes / 2; step; step /= 2) {
    const int edge = index + step - 1;
    index += (code[edge] + code[edge + 1]) / 2 < x ? step : 0;
  }
  return index;
}

// The largest magnitude of a block, NaN when a number is not finite.
VIT_INLINE float block_scale(const float (&own)[kAdamWOwn]) {
  float largest = 0, not_finite = 0;
  VIT_UNROLL for (int i = 0; i < kAdamWOwn; ++i) {
    largest = sycl::fmax(largest, sycl::fabs(own[i]));
    not_finite += own[i] - own[i];
  }
  const auto group = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_sub_group();
  return sycl::reduce_over_group(group, largest, sycl::maximum<float>()) + sum_over_lanes(not_finite);
}

template <class T>
VIT_KERNEL adamw_8bit(T* param, const T* grad, unsigned char* exp_avg, unsigned char* exp_avg_sq, float* exp_avg_scale,
                      float* exp_avg_sq_scale, float* ema, const float* code, int64 n, float decay,
                      float one_minus_beta1, float beta2, float one_minus_beta2, float rate, float eps,
                      float root_correction, float grad_scale, float one_minus_ema_decay) {
  const AdamWSettings<float> s = {decay, one_minus_beta1, beta2,      one_minus_beta2,    rate,
                                  eps,   root_correction, grad_scale, one_minus_ema_decay};
  const Place at = place();
  const int lane = at.lane;
  const float* roots = code + kAdamWCodes;
  int64 block = at.unit * (vit::tiles::kElements / kAdamWBlock);
  for (int b = 0; b < vit::tiles::kElements / kAdamWBlock && block * kAdamWBlock < n; ++b, ++block) {
    const int64 first = block * kAdamWBlock;
    const int count = n - first < kAdamWBlock ? int(n - first) : kAdamWBlock;
    const float m_scale = exp_avg_scale[block], root_scale = exp_avg_sq_scale[block];
    float m[kAdamWOwn], root[kAdamWOwn];
    VIT_UNROLL for (int j = 0; j < kAdamWOwn; ++j) {
      const int c = j * VIT_LANES + lane;
      m[j] = root[j] = 0;
      if (c >= count) continue;
      const int64 i = first + c;
      m[j] = code[exp_avg[i]] * m_scale;
      root[j] = roots[exp_avg_sq[i]] * root_scale;
      float v = root[j] * root[j];
      const float moved = adamw_step(s, load<float>(param + i), load<float>(grad + i), m[j], v, root[j]);
      store(param + i, moved);
      if (ema) ema[i] += (moved - ema[i]) * s.one_minus_ema_decay;
    }
    const float new_m_scale = block_scale(m), new_root_scale = block_scale(root);
    const float m_divisor = new_m_scale > 0 ? new_m_scale : 1, root_divisor = new_root_scale > 0 ? new_root_scale : 1;
    VIT_UNROLL for (int j = 0; j < kAdamWOwn; ++j) {
      const int c = j * VIT_LANES + lane;
      if (c >= count) continue;
      const int index = nearest(roots, root[j] / root_divisor);
      exp_avg[first + c] = static_cast<unsigned char>(nearest(code, m[j] / m_divisor));
      // A root that is not 0 does not become 0: it would be divided by.
      exp_avg_sq[first + c] = static_cast<unsigned char>(root[j] > 0 && index == 0 ? 1 : index);
    }
    if (lane == 0) exp_avg_scale[block] = new_m_scale, exp_avg_sq_scale[block] = new_root_scale;
  }
}
