// Element types, their accumulators, 16-byte vectors, and the loads and stores that convert between them.
#pragma once

#include "instructions.cuh"
#include "vit.h"

namespace vit::cuda {

// The accumulator type of an element type (vit.h: float64 for float64, else float32).
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::float16;
};

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(int32_t x) { return static_cast<float>(x); }
__device__ inline float to_acc(bf16 x) { return bf16_to_float(x); }
__device__ inline float to_acc(f16 x) { return f16_to_float(x); }

template <class T>
__device__ inline T from_acc(Acc<T> x) {
  return x;
}
template <>
__device__ inline bf16 from_acc<bf16>(float x) {
  return float_to_bf16(x);
}
template <>
__device__ inline f16 from_acc<f16>(float x) {
  return float_to_f16(x);
}

// Elements of k in one product of the tensor cores: 32 bytes of them.
template <class T>
inline constexpr int kMmaK = 32 / static_cast<int>(sizeof(T));

// Two neighbours of a 16-bit type in one register, the lower address in the lower half.
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  return pack_bf16(low, high);
}
template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  return pack_f16(low, high);
}

__device__ inline uint32_t float_to_tf32(float x) { return round_tf32(__float_as_uint(x)); }
__device__ inline float tf32_to_float(uint32_t x) { return __uint_as_float(x & 0xffffe000); }

// A fragment of words straight from memory, made ready for mma_16x8<T>.
template <class T, int n>
__device__ inline void prepare_fragment(uint32_t (&words)[n]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < n; ++i) words[i] = round_tf32(words[i]);
  }
}

// Four neighbouring lanes transpose a 4 x 4 matrix, lane t having column t: it gets row t.
template <class W>
__device__ inline void transpose_quad(W (&w)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & mask) continue;
      const bool high = lane & mask;
      const W got = shuffle_xor(high ? w[j] : w[j ^ mask], mask);
      (high ? w[j] : w[j ^ mask]) = got;
    }
}

template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T v[n];
};

// Elements of T in one 16-byte access.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// n consecutive elements as accumulators, n a multiple of the elements in 16 bytes and p 16-byte aligned.
template <class T, int n>
__device__ inline void load_vector(const T* p, Acc<T> (&out)[n]) {
  constexpr int width = kVector<T> < n ? kVector<T> : n;
#pragma unroll
  for (int i = 0; i < n; i += width) {
    const auto v = *reinterpret_cast<const Vector<T, width>*>(p + i);
#pragma unroll
    for (int j = 0; j < width; ++j) out[i + j] = to_acc(v.v[j]);
  }
}

template <class T, int n>
__device__ inline void store_vector(T* p, const Acc<T> (&in)[n]) {
  constexpr int width = kVector<T> < n ? kVector<T> : n;
#pragma unroll
  for (int i = 0; i < n; i += width) {
    Vector<T, width> v;
#pragma unroll
    for (int j = 0; j < width; ++j) v.v[j] = from_acc<T>(in[i + j]);
    *reinterpret_cast<Vector<T, width>*>(p + i) = v;
  }
}

// A tensor whose type is T or float32, decided at run time: parameters, residuals and outputs (vit.h).
template <class T>
struct Mixed {
  const void* data;
  bool is_float32;

  __device__ explicit operator bool() const { return data != nullptr; }

  __device__ Acc<T> load(int64_t i) const {
    return is_float32 ? static_cast<Acc<T>>(static_cast<const float*>(data)[i])
                      : to_acc(static_cast<const T*>(data)[i]);
  }

  __device__ void store(int64_t i, Acc<T> x) const {
    void* p = const_cast<void*>(data);
    if (is_float32)
      static_cast<float*>(p)[i] = static_cast<float>(x);
    else
      static_cast<T*>(p)[i] = from_acc<T>(x);
  }

  template <int n>
  __device__ void load(int64_t i, Acc<T> (&out)[n]) const {
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (int j = 0; j < n; ++j) out[j] = load(i + j);
    } else if (is_float32) {
      load_vector(static_cast<const float*>(data) + i, out);
    } else {
      load_vector(static_cast<const T*>(data) + i, out);
    }
  }

  template <int n>
  __device__ void store(int64_t i, const Acc<T> (&in)[n]) const {
    void* p = const_cast<void*>(data);
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (int j = 0; j < n; ++j) store(i + j, in[j]);
    } else if (is_float32) {
      store_vector(static_cast<float*>(p) + i, in);
    } else {
      store_vector(static_cast<T*>(p) + i, in);
    }
  }
};

template <class T>
Mixed<T> mixed(const void* data, DType dtype) {
  return {data, dtype == DType::float32};
}

}  // namespace vit::cuda
