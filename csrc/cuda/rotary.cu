// y = x cos + r(x) sin, where r gives each pair (a, b) of a head's elements as (-b, a): neighbours, or k and k + D / 2.
//
//   dx = dy cos - r(dy sin),  dcos = sum of dy x,  dsin = sum of dy r(x)
//
// The sums run over the samples and heads that share a table, in order. Bytes per element: one read and one write; the
// table stays in the L1 cache over the heads of a token. A block takes a token, a thread 16 bytes of a head (twice 16
// for the halves) where heads have them; of the gradient of the table a thread takes one element.
#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 128;

template <class H>
__device__ inline int64_t offset(const H& x, int64_t b, int64_t n, int64_t h) {
  return b * x.batch + n * x.token + h * x.head;
}

// kWide: every access is of 16 bytes. kBack: the transpose, for the gradient.
template <class T, bool kHalf, bool kWide, bool kBack>
__global__ void __launch_bounds__(kBlock) turn(Heads from, Heads table, MutableHeads to, bool float32_table, int64_t B,
                                               int64_t N, int H, int D, int64_t prefix) {
  using A = Acc<T>;
  constexpr int width = kWide ? kVector<T> : kHalf ? 1 : 2;
  const Mixed<T> angles = {table.data, float32_table};
  const int per_head = (kHalf ? D / 2 : D) / width;
  const auto load_row = [&](int64_t at, A(&out)[width]) {
    if constexpr (kWide) {
      angles.load(at, out);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) out[j] = angles.load(at + j);
    }
  };
  const auto load_head = [](const T* p, A(&out)[width]) {
    if constexpr (kWide) {
      load_vector(p, out);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) out[j] = to_acc(p[j]);
    }
  };
  const auto store_head = [](T* p, const A(&in)[width]) {
    if constexpr (kWide) {
      store_vector(p, in);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) p[j] = from_acc<T>(in[j]);
    }
  };
  for (int64_t token = blockIdx.x; token < B * N; token += gridDim.x) {
    const int64_t b = token / N, n = token % N;
    for (int i = threadIdx.x; i < H * per_head; i += kBlock) {
      const int h = i / per_head, d = i % per_head * width;
      const T* x = static_cast<const T*>(from.data) + offset(from, b, n, h) + d;
      T* y = static_cast<T*>(to.data) + offset(to, b, n, h) + d;
      A a[width];
      load_head(x, a);
      const bool turned = n >= prefix;
      const int64_t row = turned ? offset(table, b, n - prefix, h) + d : 0;
      if constexpr (kHalf) {
        A other[width];
        load_head(x + D / 2, other);
        if (turned) {
          A sin_a[width], sin_b[width], cos_a[width], cos_b[width];
          load_row(row, sin_a);
          load_row(row + D / 2, sin_b);
          load_row(row + D, cos_a);
          load_row(row + D + D / 2, cos_b);
#pragma unroll
          for (int j = 0; j < width; ++j) {
            const A first = a[j], second = other[j];
            a[j] = kBack ? first * cos_a[j] + second * sin_b[j] : first * cos_a[j] - second * sin_a[j];
            other[j] = kBack ? second * cos_b[j] - first * sin_a[j] : second * cos_b[j] + first * sin_b[j];
          }
        }
        store_head(y + D / 2, other);
      } else if (turned) {
        A sin[width], cos[width];
        load_row(row, sin);
        load_row(row + D, cos);
#pragma unroll
        for (int j = 0; j < width; j += 2) {
          const A first = a[j], second = a[j + 1];
          a[j] = kBack ? first * cos[j] + second * sin[j + 1] : first * cos[j] - second * sin[j];
          a[j + 1] = kBack ? second * cos[j + 1] - first * sin[j] : second * cos[j + 1] + first * sin[j + 1];
        }
      }
      store_head(y, a);
    }
  }
}

// A block takes a row of the table's gradient: those of the samples and heads that share it.
template <class T>
__global__ void __launch_bounds__(kBlock) table_gradient(RotaryBwd p, int64_t rows) {
  using A = Acc<T>;
  const Mixed<T> out = {p.dtable, p.param_dtype == DType::float32};
  const int64_t positions = p.N - p.prefix, half = p.D / 2;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t n = row % positions + p.prefix, h0 = row / positions % p.table_H, b0 = row / positions / p.table_H;
    const int64_t samples = p.table_B == 1 ? p.B : 1, heads = p.table_H == 1 ? p.H : 1;
    for (int64_t d = threadIdx.x; d < p.D; d += kBlock) {
      const bool first = p.pairing == Pairing::half ? d < half : d % 2 == 0;
      const int64_t partner = p.pairing == Pairing::half ? (first ? d + half : d - half) : d ^ 1;
      A sin = 0, cos = 0;
      for (int64_t b = b0; b < b0 + samples; ++b) {
        A sin_of_sample = 0, cos_of_sample = 0;
        for (int64_t h = h0; h < h0 + heads; ++h) {
          const T* x = static_cast<const T*>(p.x.data) + offset(p.x, b, n, h);
          const A dy = to_acc(static_cast<const T*>(p.dy.data)[offset(p.dy, b, n, h) + d]);
          const A other = to_acc(x[partner]);
          sin_of_sample += dy * (first ? -other : other);
          cos_of_sample += dy * to_acc(x[d]);
        }
        sin += sin_of_sample;
        cos += cos_of_sample;
      }
      out.store(row * 2 * p.D + d, sin);
      out.store(row * 2 * p.D + p.D + d, cos);
    }
  }
}

// Whether every head, and the row of its table, can be read in 16-byte pieces.
template <class H>
bool wide(const H& x, int64_t n) {
  return x.batch % n == 0 && x.token % n == 0 && x.head % n == 0 && is_aligned(x.data);
}

template <class T, bool kBack, class P>
void run(const char* op, const P& p, const Heads& from, const MutableHeads& to) {
  if (!p.B || !p.N || !p.H || !p.D) return;
  const int64_t n = kVector<T>;
  const bool half = p.pairing == Pairing::half;
  // A vector of T is one or more 16-byte pieces of a float32 table.
  const bool all = (half ? p.D / 2 : p.D) % n == 0 && wide(from, n) && wide(to, n) && wide(p.table, n);
  const Launch shape = {op, Shape({{"B", p.B}, {"N", p.N}, {"H", p.H}, {"D", p.D}}), p.context,
                        smaller<int64_t>(p.B * p.N, 1 << 30), kBlock};
  const auto go = [&](auto is_half, auto is_wide) {
    launch<turn<T, decltype(is_half)::value, decltype(is_wide)::value, kBack>>(
        shape, from, p.table, to, p.param_dtype == DType::float32, p.B, p.N, static_cast<int>(p.H),
        static_cast<int>(p.D), p.prefix);
  };
  if (half)
    all ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
  else
    all ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

void rotary_fwd(const RotaryFwd& p) {
  using namespace cuda;
  const char* op = "rotary_fwd";
  check(p);
  const DeviceGuard guard(op, p.context);
  dispatch(p.dtype, [&](auto element) { run<decltype(element), false>(op, p, p.x, p.y); });
}

void rotary_bwd(const RotaryBwd& p) {
  using namespace cuda;
  const char* op = "rotary_bwd";
  check(p);
  const DeviceGuard guard(op, p.context);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.dx.data) run<T, true>(op, p, p.dy, p.dx);
    const int64_t rows = p.table_B * p.table_H * (p.N - p.prefix);
    if (p.dtable && rows)
      launch<table_gradient<T>>({op, Shape({{"B", p.B}, {"N", p.N}, {"H", p.H}, {"D", p.D}}), p.context,
                                 smaller<int64_t>(rows, 1 << 30), kBlock},
                                p, rows);
  });
}

}  // namespace vit
