// adamw: one step of Adam with decoupled weight decay, in one pass over the parameters.
//
// Threads take runs of blocks of 256 numbers, which is also what shares a scale where the averages have 8 bits. Memory
// bound: 28 bytes per float32 parameter, 16 with averages of 8 bits, which are decoded and encoded again in the cache.
// Sources: Loshchilov, Hutter, arXiv:1711.05101; the code of 8 bits: Dettmers et al., arXiv:2110.02861.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int kBlock = static_cast<int>(kAdamWBlock);
constexpr int64_t kUnit = 16;  // blocks of one unit of work: for fewer numbers a second thread costs more than it saves
constexpr int kCodes = 256;

// Averages of a block: loops over all of them become vectors of the level.
using Block = float[kBlock];

// Indices of `code`, times the scale of the block.
VIT_INLINE void decode(const uint8_t* indices, float scale, const float* code, Block& to, int64_t count) {
  uint8_t padded[kBlock] = {};
  memcpy(padded, indices, static_cast<size_t>(count));
  for (int i = 0; i < kBlock; ++i) to[i] = i < count ? code[padded[i]] * scale : 0;
}

// Which value of a code is nearest: a cell of all numbers of one sign, exponent and 7 bits of fraction holds at most
// one edge (the middle between two values), so that a look at the cell and one comparison tell.
class Nearest {
 public:
  explicit Nearest(const float* code) {
    for (int i = 0; i < kCodes - 1; ++i) edges_[i] = (code[i] + code[i + 1]) / 2;
    edges_[kCodes - 1] = __builtin_inff();
    int positive = 0, negative = kCodes - 1;  // edges below the least number of a cell
    for (int cell = 0; cell < kCells; ++cell) {
      while (edges_[positive] < (cell ? bound(cell) : 0)) ++positive;
      while (negative > 0 && edges_[negative - 1] > -bound(cell + 1)) --negative;
      below_[cell] = static_cast<uint8_t>(positive);
      below_[kCells + cell] = static_cast<uint8_t>(negative);
    }
  }

  VIT_INLINE int operator()(float x) const {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const int32_t cell = static_cast<int32_t>((bits & 0x7fffffff) >> 16) - kFirst;
    const int first = below_[min(max(cell, 0), kCells - 1) + (bits >> 31 ? kCells : 0)];
    return first + (edges_[first] < x);
  }

 private:
  static constexpr int kFirst = (127 - 24) << 7;          // 2^-24, below every edge but 0
  static constexpr int kCells = (127 << 7) + 1 - kFirst;  // as far as 1
  static float bound(int cell) { return bit_cast<float>(static_cast<uint32_t>(cell + kFirst) << 16); }

  float edges_[kCodes];
  uint8_t below_[2 * kCells];
};

// The indices of the nearest values of the code, and the scale: the largest magnitude, NaN when one is not finite. With
// `roots` a number that is not 0 does not become 0: it would be divided by.
VIT_INLINE float encode(const Block& from, const Nearest& nearest, bool roots, uint8_t* indices, int64_t count) {
  f32v largest = {}, not_finite = {};
  for (int i = 0; i < kBlock; i += kLanes<float>) {
    const f32v x = load<float>(from + i);
    largest = vmax(x < 0 ? -x : x, largest);
    not_finite += x - x;
  }
  float scale = sum(not_finite);
  for (int i = 0; i < kLanes<float>; ++i) scale = largest[i] > scale ? largest[i] : scale;
  const float divisor = scale > 0 ? scale : 1;
  Block shares;
  for (int i = 0; i < kBlock; ++i) shares[i] = from[i] / divisor;
  for (int64_t i = 0; i < count; ++i) {
    const int index = nearest(shares[i]);
    indices[i] = static_cast<uint8_t>(roots && from[i] > 0 && index == 0 ? 1 : index);
  }
  return scale;
}

template <class A>
struct Settings {
  A decay, one_minus_beta1, beta2, one_minus_beta2, rate, eps, root_factor, grad_scale, one_minus_ema_decay;

  explicit Settings(const AdamW& p)
      : decay(static_cast<A>(1 - p.lr * p.weight_decay)),
        one_minus_beta1(static_cast<A>(1 - p.beta1)),
        beta2(static_cast<A>(p.beta2)),
        one_minus_beta2(static_cast<A>(1 - p.beta2)),
        rate(static_cast<A>(p.lr / p.correction1)),
        eps(static_cast<A>(p.eps)),
        root_factor(static_cast<A>(1 / ::sqrt(p.correction2))),
        grad_scale(static_cast<A>(p.grad_scale)),
        one_minus_ema_decay(static_cast<A>(1 - p.ema_decay)) {}
};

// A vector of parameters; m, v and its root are moved along.
template <class A>
VIT_INLINE Vec<A> step(const Settings<A>& s, Vec<A> param, Vec<A> grad, Vec<A>& m, Vec<A>& v, Vec<A>& root) {
  const Vec<A> g = grad * s.grad_scale;
  m += (g - m) * s.one_minus_beta1;
  v = v * s.beta2 + g * g * s.one_minus_beta2;
  root = vsqrt(v);
  return param * s.decay - s.rate * (m / (root * s.root_factor + s.eps));
}

// f(first, count, block) for the blocks of the parameters, in parallel.
template <class F>
VIT_INLINE void for_blocks(const AdamW& p, const F& f) {
  parallel_for(p.context.num_threads, ceil_div(p.n, kUnit * kBlock), [&](int64_t begin, int64_t end, int) {
    const int64_t stop = min(end * kUnit * kBlock, p.n);
    for (int64_t at = begin * kUnit * kBlock; at < stop; at += kBlock)
      f(at, min(int64_t{kBlock}, p.n - at), at / kBlock);
  });
}

// A vector of parameters that has moved, and of their average.
template <class T, class A>
VIT_INLINE void finish(const AdamW& p, const Settings<A>& settings, Vec<A> param, int64_t at, int64_t n) {
  store<A>(static_cast<T*>(p.param) + at, param, n);
  if (!p.ema) return;
  A* place = static_cast<A*>(p.ema) + at;
  const Vec<A> ema = load<A>(place, n);
  store<A>(place, ema + (param - ema) * settings.one_minus_ema_decay, n);
}

template <class T>
void run(const AdamW& p) {
  using A = Acc<T>;
  const Settings<A> settings(p);
  for_blocks(p, [&](int64_t first, int64_t count, int64_t) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int64_t at = first + i, n = count - i;
      A *exp_avg = static_cast<A*>(p.exp_avg) + at, *exp_avg_sq = static_cast<A*>(p.exp_avg_sq) + at;
      Vec<A> m = load<A>(exp_avg, n), v = load<A>(exp_avg_sq, n), root;
      const Vec<A> param = load<A>(static_cast<const T*>(p.param) + at, n);
      const Vec<A> grad = load<A>(static_cast<const T*>(p.grad) + at, n);
      const Vec<A> moved = step(settings, param, grad, m, v, root);
      store<A>(exp_avg, m, n);
      store<A>(exp_avg_sq, v, n);
      finish<T>(p, settings, moved, at, n);
    }
  });
}

template <class T>
void run_8bit(const AdamW& p) {
  const Settings<float> settings(p);
  const float* code = static_cast<const float*>(p.code);
  const Nearest with_sign(code), without(code + kCodes);
  for_blocks(p, [&](int64_t first, int64_t count, int64_t block) {
    Block ms, roots;
    uint8_t *m8 = static_cast<uint8_t*>(p.exp_avg) + first, *root8 = static_cast<uint8_t*>(p.exp_avg_sq) + first;
    float* m_scale = static_cast<float*>(p.exp_avg_scale) + block;
    float* root_scale = static_cast<float*>(p.exp_avg_sq_scale) + block;
    decode(m8, *m_scale, code, ms, count);
    decode(root8, *root_scale, code + kCodes, roots, count);
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int64_t at = first + i, n = count - i;
      f32v m = load<float>(ms + i), root = load<float>(roots + i), v = root * root;
      const f32v param = load<float>(static_cast<const T*>(p.param) + at, n);
      const f32v grad = load<float>(static_cast<const T*>(p.grad) + at, n);
      const f32v moved = step(settings, param, grad, m, v, root);
      store<float>(ms + i, keep(m, n, 0.0f));
      store<float>(roots + i, keep(root, n, 0.0f));
      finish<T>(p, settings, moved, at, n);
    }
    *m_scale = encode(ms, with_sign, false, m8, count);
    *root_scale = encode(roots, without, true, root8, count);
  });
}

}  // namespace

void adamw(const AdamW& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (same<Acc<T>, float>)
      if (p.exp_avg_scale) return run_8bit<T>(p);
    run<T>(p);
  });
}

}  // namespace vit::VIT_ISA
