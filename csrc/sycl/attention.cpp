// attention on the device: sizes to launches (kernels: kernels/attention.h).
#include <algorithm>

#include "check.h"
#include "gemm.h"

namespace vit {
namespace {

using namespace device;

std::string instance(const char* name, DType dtype) { return std::string(name) + "<" + type_name(dtype) + ">"; }

std::string backward_instance(DType dtype, bool whole) {
  return std::string("attention_bwd<") + type_name(dtype) + (whole ? ", true>" : ", false>");
}

enum ForwardKernel { kForwardCopy, kForwardMain };
const Family kForward = {8, "attention.h", [](const std::vector<DType>& d) {
                           return std::vector<std::string>{instance("copy_heads", d[0]),
                                                           instance("attention_fwd", d[0])};
                         }};

// Two ways to divide the work, each a family: a process compiles what its device needs.
enum BackwardKernel { kBackwardCopy, kBackwardMain, kGradientOfQ };
const Family kWholeHeads = {9, "attention.h", [](const std::vector<DType>& d) {
                              return std::vector<std::string>{instance("copy_heads", d[0]),
                                                              backward_instance(d[0], true)};
                            }};
const Family kDividedHeads = {10, "attention.h", [](const std::vector<DType>& d) {
                                return std::vector<std::string>{instance("copy_heads", d[0]),
                                                                backward_instance(d[0], false),
                                                                instance("attention_bwd_q", d[0])};
                              }};

// What all kernels are told: sizes as numbers of 32 bits.
struct Sizes {
  int B, H, N, L, D;
};

template <class P>
Sizes sizes(const char* op, const P& p) {
  for (const int64_t size : {p.B, p.H, p.N, p.L, p.D})
    if (size > 0x7fffffff) throw Error(std::string(op) + ": a size is " + std::to_string(size) + ", 2^31 or more");
  return {static_cast<int>(p.B), static_cast<int>(p.H), static_cast<int>(p.N), static_cast<int>(p.L),
          static_cast<int>(p.D)};
}

// What the kernels' scratch memory is made of, in elements: a block of W rows of either side, and the head's D columns
// in whole vectors.
struct Block {
  int64_t W, columns, room;  // room: the rows of scores that a tile may read beyond the last one

  Block(DType dtype, const Context& context, int64_t D) {
    const int64_t lanes = variant_of(context).lanes;
    const bool wide = dtype == DType::float64;
    W = (wide ? tiles::AttentionTile<double>::vectors : tiles::AttentionTile<float>::vectors) * lanes;
    room = (wide ? tiles::AttentionTile<double>::rows : tiles::AttentionTile<float>::rows) * W;
    columns = ceil_div(D, lanes) * lanes;
  }
  int64_t rows() const { return W * columns; }
  int64_t scores(int64_t n) const { return n * W + room; }
};

// Sub-groups that share out the blocks of `n` rows of every head.
template <class P>
int64_t units_for(const P& p, int64_t n) {
  return persistent_units(p.context, p.B * p.H * ceil_div(n, Block(p.dtype, p.context, p.D).W));
}

// Whether kernels read the rows where they lie: in the accumulator type, each in whole vectors.
template <class P>
bool in_place(const P& p) {
  return p.dtype == accumulator(p.dtype) && p.D % variant_of(p.context).lanes == 0;
}

template <class P>
int64_t copied_bytes(const P& p, int64_t n) {
  const int64_t columns = Block(p.dtype, p.context, p.D).columns;
  return p.B * p.H * n * columns * static_cast<int64_t>(size_of(accumulator(p.dtype)));
}

template <class P>
int64_t readable_bytes(const P& p, int64_t n) {
  return in_place(p) ? 0 : copied_bytes(p, n);
}

// A copy of the rows in the accumulator type, times `factor`, filled up to whole vectors.
template <class P>
Heads copied(Call& call, const Bundle& bundle, int kernel, const P& p, const Heads& x, int64_t n, char* to,
             double factor) {
  const int64_t rows = p.B * p.H * n, columns = Block(p.dtype, p.context, p.D).columns;
  call.launch(bundle, kernel, ceil_div(rows, tiles::kCopiedRows), x.data, static_cast<void*>(to), static_cast<int>(p.H),
              static_cast<int>(n), static_cast<int>(p.D), x.batch, x.token, x.head, factor, rows);
  return {to, p.H * n * columns, columns, n * columns};
}

// The rows as kernels read them: themselves or a copy.
template <class P>
Heads readable(Call& call, const Bundle& bundle, int kernel, const P& p, const Heads& x, int64_t n, char* to) {
  return in_place(p) ? x : copied(call, bundle, kernel, p, x, n, to, 1.0);
}

struct Forward {
  int64_t units, stride;
  char *k, *v, *scratch;
  int64_t bytes;

  Forward(const AttentionFwd& p, char* base) : units(units_for(p, p.N)) {
    const Block block(p.dtype, p.context, p.D);
    stride = block.W + 2 * block.rows() + block.scores(p.L);
    Arena arena{base};
    k = arena.take(readable_bytes(p, p.L));
    v = arena.take(readable_bytes(p, p.L));
    scratch = arena.take(units * stride * static_cast<int64_t>(size_of(accumulator(p.dtype))));
    bytes = arena.used;
  }
};

struct Backward {
  bool whole;
  int64_t units, stride, q_units, q_stride;
  char *k, *v, *q, *dout, *delta, *scratch;
  int64_t bytes;

  // Whole heads where a few sub-groups fill the device; without keys dq is 0, which attention_bwd_q writes.
  Backward(const AttentionBwd& p, char* base) : whole(variant_of(p.context).whole_heads && p.L > 0) {
    const int64_t acc = static_cast<int64_t>(size_of(accumulator(p.dtype)));
    const Block block(p.dtype, p.context, p.D);
    units = whole ? persistent_units(p.context, p.B * p.H) : units_for(p, p.L);
    stride = 3 * block.rows() + 2 * block.scores(p.N) + (whole ? p.N * block.columns : 0);
    q_units = whole ? 0 : units_for(p, p.N);
    q_stride = 3 * block.rows() + block.scores(p.L);
    Arena arena{base};
    k = arena.take(readable_bytes(p, p.L));
    v = arena.take(readable_bytes(p, p.L));
    q = arena.take(copied_bytes(p, p.N));
    dout = arena.take(readable_bytes(p, p.N));
    delta = arena.take(p.B * p.H * p.N * acc);
    scratch = arena.take(std::max(units * stride, q_units * q_stride) * acc);
    bytes = arena.used;
  }
};

template <class P, class Data>
int64_t span(const P& p, int64_t n, const HeadsOf<Data>& x) {
  return extent(p.B, x.batch, n, x.token, p.H, x.head, p.D, 1);
}

// n tokens of every head, as kernels may read them.
template <class P>
Heads given(Call& call, const P& p, int64_t n, const Heads& x) {
  return {call.in(x.data, span(p, n, x), size_of(p.dtype)), x.batch, x.token, x.head};
}

template <class P>
void* written(Call& call, const P& p, int64_t n, const MutableHeads& x) {
  return call.out(x.data, span(p, n, x), size_of(p.dtype));
}

}  // namespace

void attention_fwd(const AttentionFwd& p) {
  check(p);
  if (!p.B || !p.N || !p.H || !p.D) return;
  Call call("attention_fwd", p.context);
  const Sizes s = sizes("attention_fwd", p);
  const std::size_t size = size_of(p.dtype), acc = size_of(accumulator(p.dtype));
  const Bundle& bundle = call.bundle(kForward, {p.dtype});
  const Forward f(p, static_cast<char*>(call.scratch(p.workspace, attention_fwd_workspace(p))));
  const void* q = given(call, p, p.N, p.q).data;
  const Heads k = readable(call, bundle, kForwardCopy, p, given(call, p, p.L, p.k), p.L, f.k);
  const Heads v = readable(call, bundle, kForwardCopy, p, given(call, p, p.L, p.v), p.L, f.v);
  call.launch(bundle, kForwardMain, f.units, q, k.data, v.data, call.out(p.out, p.B * p.N * p.H * p.D, size),
              call.out(p.stats, 2 * p.B * p.H * p.N, acc), static_cast<void*>(f.scratch), s.B, s.H, s.N, s.L, s.D,
              p.q.batch, p.q.token, p.q.head, k.batch, k.token, k.head, v.batch, v.token, v.head, p.scale, f.stride,
              f.units);
  call.finish();
}

void attention_bwd(const AttentionBwd& p) {
  check(p);
  if (!p.B || !p.H || !p.D || (!p.N && !p.L)) return;
  Call call("attention_bwd", p.context);
  const Sizes s = sizes("attention_bwd", p);
  const std::size_t size = size_of(p.dtype), acc = size_of(accumulator(p.dtype));
  const bool whole = Backward(p, nullptr).whole;
  const Bundle& bundle = call.bundle(whole ? kWholeHeads : kDividedHeads, {p.dtype});
  const Backward b(p, static_cast<char*>(call.scratch(p.workspace, attention_bwd_workspace(p))));
  const int64_t row = p.H * p.D;
  const Heads q = given(call, p, p.N, p.q), k = given(call, p, p.L, p.k), v = given(call, p, p.L, p.v);
  const Heads dout{call.in(p.dout, p.B * p.N * row, size), p.N * row, row, p.D};
  const void* out = call.in(p.out, p.B * p.N * row, size);
  const void* stats = call.in(p.stats, 2 * p.B * p.H * p.N, acc);
  void* dq = written(call, p, p.N, p.dq);
  void* dk = written(call, p, p.L, p.dk);
  void* dv = written(call, p, p.L, p.dv);
  void *delta = b.delta, *scratch = b.scratch;

  const Heads keys = readable(call, bundle, kBackwardCopy, p, k, p.L, b.k);
  const Heads values = readable(call, bundle, kBackwardCopy, p, v, p.L, b.v);
  const Heads gradients = readable(call, bundle, kBackwardCopy, p, dout, p.N, b.dout);
  if (!whole)
    call.launch(bundle, kGradientOfQ, b.q_units, gradients.data, q.data, keys.data, values.data, out, stats, dq, delta,
                scratch, s.B, s.H, s.N, s.L, s.D, gradients.batch, gradients.token, gradients.head, p.q.batch,
                p.q.token, p.q.head, keys.batch, keys.token, keys.head, values.batch, values.token, values.head,
                p.dq.batch, p.dq.token, p.dq.head, p.scale, b.q_stride, b.q_units);
  const Heads queries = copied(call, bundle, kBackwardCopy, p, q, p.N, b.q, p.scale);
  call.launch(bundle, kBackwardMain, b.units, gradients.data, queries.data, keys.data, values.data, out, stats, delta,
              dq, dk, dv, scratch, s.B, s.H, s.N, s.L, s.D, gradients.batch, gradients.token, gradients.head,
              queries.batch, queries.token, queries.head, keys.batch, keys.token, keys.head, values.batch, values.token,
              values.head, p.dq.batch, p.dq.token, p.dq.head, p.dk.batch, p.dk.token, p.dk.head, p.dv.batch, p.dv.token,
              p.dv.head, p.scale, b.stride, b.units);
  call.finish();
}

std::size_t attention_fwd_workspace(const AttentionFwd& p) {
  return static_cast<std::size_t>(Forward(p, nullptr).bytes);
}

std::size_t attention_bwd_workspace(const AttentionBwd& p) {
  return static_cast<std::size_t>(Backward(p, nullptr).bytes);
}

}  // namespace vit
