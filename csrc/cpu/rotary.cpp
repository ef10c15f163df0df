// rotary: y = x cos + r(x) sin, where r gives each pair (a, b) of a head's elements as (-b, a): neighbours, or k and
// k + D / 2.
//
//   dx = dy cos - r(dy sin),  dcos = sum of dy x,  dsin = sum of dy r(x)
//
// The sums run over the samples and heads that share a table: over the heads of a sample, then over the samples, both
// in order. Saved for the backward: the table, and x where the table has a gradient. Threads take tokens; the table is
// read once for all heads of a token. Moved per element: 2 elements and the table; 3 FLOPs. Source: Su et al.,
// "RoFormer", arXiv:2104.09864.
#include "cpu/rotary.h"

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int64_t kElements = 4096;  // of one unit of work: below it a second thread costs more than it saves

template <class T, class H>
VIT_INLINE auto head_of(const H& x, int64_t b, int64_t n, int64_t h) {
  const int64_t at = b * x.batch + n * x.token + h * x.head;
  if constexpr (same<H, MutableHeads>)
    return static_cast<T*>(x.data) + at;
  else
    return static_cast<const T*>(x.data) + at;
}

// All tokens of `from` turned into `to`, or back.
template <class T, class P, bool kHalf, bool kBack, class Params>
void turn_all(const Params& p, const Heads& from, const MutableHeads& to) {
  const int64_t tokens = max(int64_t{1}, kElements / max(p.H * p.D, int64_t{1}));
  parallel_for(p.context.num_threads, ceil_div(p.B * p.N, tokens), [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin * tokens; token < min(end * tokens, p.B * p.N); ++token) {
      const int64_t b = token / p.N, n = token % p.N;
      for (int64_t h = 0; h < p.H; ++h) {
        const T* x = head_of<T>(from, b, n, h);
        T* y = head_of<T>(to, b, n, h);
        if (n < p.prefix) {
          if (x != y) memcpy(y, x, static_cast<size_t>(p.D) * sizeof(T));
          continue;
        }
        const P* sin = head_of<P>(p.table, b, n - p.prefix, h);
        turn<T, P, kHalf, kBack>(x, sin, sin + p.D, y, p.D);
      }
    }
  });
}

// The gradient of a table's row: of the samples from b and the heads from h that share it.
template <class T, class P, bool kHalf>
VIT_INLINE void table_row(const RotaryBwd& p, int64_t first_b, int64_t first_h, int64_t n, P* dsin, P* dcos) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t samples = p.table_B == 1 ? p.B : 1, heads = p.table_H == 1 ? p.H : 1;
  for_pairs<A, kHalf>(p.D, [&](int64_t i, int64_t partner, int64_t count) {
    V sin_i{}, cos_i{}, sin_partner{}, cos_partner{};
    for (int64_t b = first_b; b < first_b + samples; ++b) {
      V s{}, c{}, t{}, d{};
      for (int64_t h = first_h; h < first_h + heads; ++h) {
        const T *x = head_of<T>(p.x, b, n, h), *dy = head_of<T>(p.dy, b, n, h);
        const V xa = load<A>(x + i, count), ga = load<A>(dy + i, count);
        c = fma(ga, xa, c);
        if constexpr (kHalf) {
          const V xb = load<A>(x + partner, count), gb = load<A>(dy + partner, count);
          s -= ga * xb;
          t = fma(gb, xa, t);
          d = fma(gb, xb, d);
        } else {
          s += ga * (alternating<A>() * neighbours<A>(xa));
        }
      }
      sin_i += s, cos_i += c, sin_partner += t, cos_partner += d;
    }
    store<A>(dsin + i, sin_i, count);
    store<A>(dcos + i, cos_i, count);
    if constexpr (kHalf) {
      store<A>(dsin + partner, sin_partner, count);
      store<A>(dcos + partner, cos_partner, count);
    }
  });
}

template <class T, class P, bool kHalf>
void backward(const RotaryBwd& p) {
  if (p.dx.data) turn_all<T, P, kHalf, true>(p, p.dy, p.dx);
  if (!p.dtable) return;
  const int64_t positions = p.N - p.prefix;
  const int64_t rows = p.table_B * p.table_H * positions;
  parallel_for(p.context.num_threads, rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row % positions, h = row / positions % p.table_H, b = row / positions / p.table_H;
      P* dsin = static_cast<P*>(p.dtable) + row * 2 * p.D;
      table_row<T, P, kHalf>(p, b, h, n + p.prefix, dsin, dsin + p.D);
    }
  });
}

// Calls f(T, P, constant) with the element types and whether the pairing is half.
template <class Params, class F>
VIT_INLINE void with_types(const Params& p, const F& f) {
  with_dtype(p.dtype, [&](auto t) {
    with_param<decltype(t)>(p.param_dtype, [&](auto w) {
      switch (p.pairing) {
        case Pairing::interleaved:
          return f.template operator()<decltype(t), decltype(w), false>();
        case Pairing::half:
          return f.template operator()<decltype(t), decltype(w), true>();
      }
    });
  });
}

struct Forward {
  const RotaryFwd& p;
  template <class T, class P, bool kHalf>
  VIT_INLINE void operator()() const {
    turn_all<T, P, kHalf, false>(p, p.x, p.y);
  }
};

struct Backward {
  const RotaryBwd& p;
  template <class T, class P, bool kHalf>
  VIT_INLINE void operator()() const {
    backward<T, P, kHalf>(p);
  }
};

}  // namespace

void rotary_fwd(const RotaryFwd& p) { with_types(p, Forward{p}); }

void rotary_bwd(const RotaryBwd& p) { with_types(p, Backward{p}); }

}  // namespace vit::VIT_ISA
