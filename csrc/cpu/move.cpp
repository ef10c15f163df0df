// move: out = [lead; a] along dimension 1, plus b; a may be a sum of several views, divided by a number.
//
//   out[i] = (i1 < leads ? lead[i] : (sum over t < terms of a[t, i0 i1-leads i2 ... i5]) / divisor) + b[i]
//
// Not PyTorch's copies: each of their parallel regions leaves OpenMP workers behind that spin on the cores the next
// kernel needs, and a forked child that opens one waits for ever for threads it does not have.
//
// Threads take runs of rows of the last dimension. Memory bound: each element is read and written once. Terms are added
// in blocks of 16 and the blocks in order, so that rounding errors grow with 16 + terms / 16 and not with the terms.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int64_t kElements = 8192;  // of one unit of work: below it a second thread costs more than it saves
constexpr int64_t kBlock = 16;       // terms

// A place in a view, moved along with the rows of `out`.
template <class T>
struct Place {
  const T* data;
  const int64_t* strides;

  const T* at(const int64_t (&i)[5], int64_t before) const {
    if (!data) return nullptr;
    const T* p = data + (i[1] - before) * strides[1];
    return p + i[0] * strides[0] + i[2] * strides[2] + i[3] * strides[3] + i[4] * strides[4];
  }
};

// n elements `stride` apart.
template <class T>
VIT_INLINE void copy(const T* from, int64_t stride, T* to, int64_t n) {
  if (stride == 1) {
    memcpy(to, from, static_cast<std::size_t>(n) * sizeof(T));
    return;
  }
  for (int64_t c = 0; c < n; ++c) to[c] = from[c * stride];
}

// Elements c .. c + n - 1 of a row, the rest of the vector 0.
template <class T, class A>
VIT_INLINE Vec<A> elements(const T* row, int64_t stride, int64_t c, int64_t n) {
  if (stride == 1) return n == kLanes<A> ? load<A>(row + c) : load<A>(row + c, n);
  T part[kLanes<A>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = row[(c + i) * stride];
  return load<A>(part);
}

// A row of sums: of `terms` rows, divided, and of one more.
template <class T>
void add(const T* row, int64_t stride, int64_t terms, int64_t term, double divisor, const T* more, int64_t more_stride,
         T* to, int64_t columns) {
  using A = Acc<T>;
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const int64_t n = min(columns - c, int64_t{kLanes<A>});
    Vec<A> sum = broadcast(A(0)), blocks = sum;
    if (row) {
      sum = elements<T, A>(row, stride, c, n);
      for (int64_t t = 1; t < terms; ++t) {
        if (t % kBlock == 0) blocks += sum, sum = broadcast(A(0));
        sum += elements<T, A>(row + t * term, stride, c, n);
      }
      if (terms >= kBlock) {
        if (terms % kBlock == 0) blocks += sum, sum = broadcast(A(0));
        sum += blocks;
      }
      if (divisor != 1) sum /= broadcast(static_cast<A>(divisor));
    }
    if (more) sum += elements<T, A>(more, more_stride, c, n);
    n == kLanes<A> ? store<A>(to + c, sum) : store<A>(to + c, sum, n);
  }
}

template <class T>
void run(const Move& p) {
  const auto& n = p.sizes;
  const int64_t columns = n[5], rows = n[0] * n[1] * n[2] * n[3] * n[4];
  if (!rows || !columns) return;
  const Place<T> a{p.terms > 0 ? static_cast<const T*>(p.a.data) : nullptr, p.a.strides};
  const Place<T> lead{static_cast<const T*>(p.lead.data), p.lead.strides};
  const Place<T> b{static_cast<const T*>(p.b.data), p.b.strides};
  const int64_t per_unit = max(int64_t{1}, kElements / (columns * max(int64_t{1}, p.terms)));
  parallel_for(p.context.num_threads, ceil_div(rows, per_unit), [&](int64_t begin, int64_t end, int) {
    int64_t row = begin * per_unit, i[5];
    const int64_t stop = min(end * per_unit, rows);
    for (int64_t d = 4, rest = row; d >= 0; rest /= n[d], --d) i[d] = rest % n[d];
    for (T* to = static_cast<T*>(p.out) + row * columns; row < stop; ++row, to += columns) {
      const bool leading = i[1] < p.leads;
      const View& view = leading ? p.lead : p.a;
      const T* from = leading ? lead.at(i, 0) : a.at(i, p.leads);
      const T* more = b.at(i, 0);
      const int64_t terms = leading ? 1 : p.terms;
      const double divisor = leading ? 1 : p.divisor;
      if (from && !more && terms == 1 && divisor == 1)
        copy(from, view.strides[5], to, columns);
      else if (!from && !more)
        memset(static_cast<void*>(to), 0, static_cast<std::size_t>(columns) * sizeof(T));
      else
        add(from, view.strides[5], terms, p.term, divisor, more, p.b.strides[5], to, columns);
      for (int d = 4; d >= 0 && ++i[d] == n[d]; --d) i[d] = 0;
    }
  });
}

}  // namespace

void move(const Move& p) {
  with_dtype(p.dtype, [&](auto t) { run<decltype(t)>(p); });
}

}  // namespace vit::VIT_ISA
