// Vectors of one instruction-set level, written with GCC's vector extensions: the same source gives 128, 256 or 512
// bits.
//
// A kernel computes in the accumulator type A (float or double) with vectors of kLanes<A> elements; load and store
// convert from and to the element type. Ends of rows take the partial forms load(p, n) and store(p, v, n), so that an
// element's result never depends on where in a row it stands and nothing beyond a row is touched.
#pragma once

#include <math.h>

#include "cpu/common.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace vit::VIT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef float f32v __attribute__((vector_size(kVectorBytes)));
typedef double f64v __attribute__((vector_size(kVectorBytes)));
typedef int32_t i32v __attribute__((vector_size(kVectorBytes)));
typedef uint32_t u32v __attribute__((vector_size(kVectorBytes)));
typedef int64_t i64v __attribute__((vector_size(kVectorBytes)));
typedef uint16_t u16hv __attribute__((vector_size(kVectorBytes / 2)));  // as many elements as f32v
typedef float f32hv __attribute__((vector_size(kVectorBytes / 2)));     // as many elements as f64v

template <class A>
struct VecOf {
  using type = f32v;
  using mask = i32v;
};
template <>
struct VecOf<double> {
  using type = f64v;
  using mask = i64v;
};
template <class A>
using Vec = typename VecOf<A>::type;

VIT_INLINE f32v broadcast(float x) { return x - f32v{}; }
VIT_INLINE f64v broadcast(double x) { return x - f64v{}; }

// a * b + c in one rounding where the level has FMA.
template <class V>
VIT_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// x, of whose computation the compiler knows nothing: a product in it is rounded, and becomes no part of an FMA.
template <class V>
VIT_INLINE V opaque(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Bit patterns of one type read as another of the same size.
template <class To, class From>
VIT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// --- bfloat16 -------------------------------------------------------------------------------------------------------

VIT_INLINE float to_acc(float x) { return x; }
VIT_INLINE double to_acc(double x) { return x; }
VIT_INLINE float to_acc(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// One 32-bit lane for each element.
VIT_INLINE u32v widen(u16hv bits) {
#if defined(__AVX512F__)
  return bit_cast<u32v>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));  // GCC 12 makes it two halves
#elif defined(__AVX2__)
  return bit_cast<u32v>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, u32v);
#endif
}

VIT_INLINE f32v from_bf16(u16hv bits) { return bit_cast<f32v>(widen(bits) << 16); }

// Round to nearest even; a NaN stays a NaN (adding the rounding term could carry it to infinity).
VIT_INLINE u16hv to_bf16(f32v x) {
#if defined(__AVX512BF16__)
  return bit_cast<u16hv>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)));
#else
  const u32v bits = bit_cast<u32v>(x);
  const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32v quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : quiet_nan, u16hv);
#endif
}

// --- load, store ----------------------------------------------------------------------------------------------------

template <class V, class T>
VIT_INLINE V load_raw(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// load_raw(p, n): the first n elements (n < lanes of V) of p, the rest 0. store_raw(p, v, n): the first n elements of
// v.
#if defined(__AVX512F__)
template <class V, class T>
VIT_INLINE V load_raw(const T* p, int64_t n) {
  const uint64_t bytes = (uint64_t{1} << (n * static_cast<int64_t>(sizeof(T)))) - 1;
  if constexpr (sizeof(V) == 64)
    return bit_cast<V>(_mm512_maskz_loadu_epi8(bytes, p));
  else
    return bit_cast<V>(_mm256_maskz_loadu_epi8(static_cast<uint32_t>(bytes), p));
}
template <class V, class T>
VIT_INLINE void store_raw(T* p, V v, int64_t n) {
  const uint64_t bytes = (uint64_t{1} << (n * static_cast<int64_t>(sizeof(T)))) - 1;
  if constexpr (sizeof(V) == 64)
    _mm512_mask_storeu_epi8(p, bytes, bit_cast<__m512i>(v));
  else
    _mm256_mask_storeu_epi8(p, static_cast<uint32_t>(bytes), bit_cast<__m256i>(v));
}
#else
template <class V, class T>
VIT_INLINE V load_raw(const T* p, int64_t n) {
  V v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
}
template <class V, class T>
VIT_INLINE void store_raw(T* p, V v, int64_t n) {
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
}
#endif

// load<A>(p): kLanes<A> elements of type T as accumulators.
template <class A, class T>
struct Memory;

template <>
struct Memory<float, float> {
  static VIT_INLINE f32v load(const float* p) { return load_raw<f32v>(p); }
  static VIT_INLINE f32v load(const float* p, int64_t n) { return load_raw<f32v>(p, n); }
  static VIT_INLINE void store(float* p, f32v v) { memcpy(p, &v, sizeof v); }
  static VIT_INLINE void store(float* p, f32v v, int64_t n) { store_raw(p, v, n); }
};

template <>
struct Memory<double, double> {
  static VIT_INLINE f64v load(const double* p) { return load_raw<f64v>(p); }
  static VIT_INLINE f64v load(const double* p, int64_t n) { return load_raw<f64v>(p, n); }
  static VIT_INLINE void store(double* p, f64v v) { memcpy(p, &v, sizeof v); }
  static VIT_INLINE void store(double* p, f64v v, int64_t n) { store_raw(p, v, n); }
};

template <>
struct Memory<float, bf16> {
  static VIT_INLINE f32v load(const bf16* p) { return from_bf16(load_raw<u16hv>(p)); }
  static VIT_INLINE f32v load(const bf16* p, int64_t n) { return from_bf16(load_raw<u16hv>(p, n)); }
  static VIT_INLINE void store(bf16* p, f32v v) {
    const u16hv bits = to_bf16(v);
    memcpy(p, &bits, sizeof bits);
  }
  static VIT_INLINE void store(bf16* p, f32v v, int64_t n) { store_raw(p, to_bf16(v), n); }
};

template <>
struct Memory<double, float> {  // float32 parameters beside float64 activations
  static VIT_INLINE f64v load(const float* p) { return __builtin_convertvector(load_raw<f32hv>(p), f64v); }
  static VIT_INLINE f64v load(const float* p, int64_t n) {
    return __builtin_convertvector(load_raw<f32hv>(p, n), f64v);
  }
  static VIT_INLINE void store(float* p, f64v v) {
    const f32hv narrow = __builtin_convertvector(v, f32hv);
    memcpy(p, &narrow, sizeof narrow);
  }
  static VIT_INLINE void store(float* p, f64v v, int64_t n) { store_raw(p, __builtin_convertvector(v, f32hv), n); }
};

template <class A, class T>
VIT_INLINE Vec<A> load(const T* p) {
  return Memory<A, T>::load(p);
}
template <class A, class T>
VIT_INLINE Vec<A> load(const T* p, int64_t n) {
  return n >= kLanes<A> ? Memory<A, T>::load(p) : Memory<A, T>::load(p, n);
}
template <class A, class T>
VIT_INLINE void store(T* p, Vec<A> v) {
  Memory<A, T>::store(p, v);
}
template <class A, class T>
VIT_INLINE void store(T* p, Vec<A> v, int64_t n) {
  n >= kLanes<A> ? Memory<A, T>::store(p, v) : Memory<A, T>::store(p, v, n);
}

// One element, converted.
template <class T, class A>
VIT_INLINE T from_acc(A x) {
  T out;
  store<A>(&out, broadcast(x), 1);
  return out;
}

// --- across lanes ---------------------------------------------------------------------------------------------------

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = i32v;
  static constexpr int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};
template <>
struct Lanes<double> {
  using Int = i64v;
  static constexpr int64_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
};

// All lanes of v below n (n <= lanes) kept, the others replaced by `other`.
template <class V, class A>
VIT_INLINE V keep(V v, int64_t n, A other) {
  using Int = typename Lanes<A>::Int;
  const Int number = load_raw<Int>(Lanes<A>::numbers);
  return number < static_cast<decltype(Lanes<A>::numbers[0] + 0)>(n) ? v : broadcast(other);
}

// The n lanes of v combined by f, by halves: (0, n/2), ..., the same tree for every element type.
template <class A, int n, class V, class F>
VIT_INLINE A fold(V v, const F& f) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    typedef A Half __attribute__((vector_size(n / 2 * sizeof(A))));
    Half low, high;
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {  // GCC 12 takes a detour through memory
      low = bit_cast<Half>(_mm512_maskz_extracti64x4_epi64(0xf, bit_cast<__m512i>(v), 0));
      high = bit_cast<Half>(_mm512_maskz_extracti64x4_epi64(0xf, bit_cast<__m512i>(v), 1));
      return fold<A, n / 2>(f(low, high), f);
    }
#endif
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<A, n / 2>(f(low, high), f);
  }
}

struct Add {
  template <class V>
  VIT_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
VIT_INLINE float sum(f32v v) { return fold<float, kLanes<float>>(v, Add{}); }
VIT_INLINE double sum(f64v v) { return fold<double, kLanes<double>>(v, Add{}); }

// The larger or smaller of each lane; a NaN in b wins, so that a running maximum keeps it. These are the semantics of
// the x86 instructions; GCC 12 makes a comparison and a blend of the plain expression.
#if defined(__AVX512F__)
VIT_INLINE f32v vmax(f32v a, f32v b) {
  return bit_cast<f32v>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
VIT_INLINE f64v vmax(f64v a, f64v b) {
  return bit_cast<f64v>(_mm512_maskz_max_pd(0xff, bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
}
VIT_INLINE f32v vmin(f32v a, f32v b) {
  return bit_cast<f32v>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
VIT_INLINE f64v vmin(f64v a, f64v b) {
  return bit_cast<f64v>(_mm512_maskz_min_pd(0xff, bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
}
#elif defined(__AVX2__)
VIT_INLINE f32v vmax(f32v a, f32v b) { return _mm256_max_ps(a, b); }
VIT_INLINE f64v vmax(f64v a, f64v b) { return _mm256_max_pd(a, b); }
VIT_INLINE f32v vmin(f32v a, f32v b) { return _mm256_min_ps(a, b); }
VIT_INLINE f64v vmin(f64v a, f64v b) { return _mm256_min_pd(a, b); }
#else
template <class V>
VIT_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
VIT_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
#endif

// Square roots of the lanes.
#if defined(__AVX512F__)
VIT_INLINE f32v vsqrt(f32v x) { return bit_cast<f32v>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x))); }
VIT_INLINE f64v vsqrt(f64v x) { return bit_cast<f64v>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(x))); }
#elif defined(__AVX2__)
VIT_INLINE f32v vsqrt(f32v x) { return _mm256_sqrt_ps(x); }
VIT_INLINE f64v vsqrt(f64v x) { return _mm256_sqrt_pd(x); }
#else
VIT_INLINE f32v vsqrt(f32v x) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
VIT_INLINE f64v vsqrt(f64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

template <int kBytes>
struct Index {
  using type = int32_t;
};
template <>
struct Index<8> {
  using type = int64_t;
};

// Shuffle masks of one step of a transpose: exchange the blocks of D x D above and below the diagonal.
template <class I, int L, int D>
struct Exchange {
  typedef I Mask __attribute__((vector_size(L * sizeof(I))));
  static VIT_INLINE Mask upper() {
    Mask m;
    for (int j = 0; j < L; ++j) m[j] = static_cast<I>(j & D ? L + j - D : j);
    return m;
  }
  static VIT_INLINE Mask lower() {
    Mask m;
    for (int j = 0; j < L; ++j) m[j] = static_cast<I>(j & D ? L + j : j + D);
    return m;
  }
};

template <class V, int L, int D>
VIT_INLINE void exchange(V (&rows)[L]) {
  using E = Exchange<typename Index<sizeof(V) / L>::type, L, D>;
  _Pragma("GCC unroll 16") for (int i = 0; i < L; ++i) {
    if (i & D) continue;
    const V upper = __builtin_shuffle(rows[i], rows[i + D], E::upper());
    rows[i + D] = __builtin_shuffle(rows[i], rows[i + D], E::lower());
    rows[i] = upper;
  }
}

// A square block, one row per vector, transposed in registers.
template <class V, int L>
VIT_INLINE void transpose(V (&rows)[L]) {
  exchange<V, L, 1>(rows);
  if constexpr (L > 2) exchange<V, L, 2>(rows);
  if constexpr (L > 4) exchange<V, L, 4>(rows);
  if constexpr (L > 8) exchange<V, L, 8>(rows);
}

}  // namespace vit::VIT_ISA
