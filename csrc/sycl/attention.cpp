// attention on the device: sizes to launches (kernels: kernels/attention.h).
#include <algorithm>

#include "check.h"
#include "product.h"

namespace vit {
namespace {

using namespace device;

std::string instance(const char* name, DType dtype) { return std::string(name) + "<" + type_name(dtype) + ">"; }

enum ForwardKernel { kForwardWiden, kForwardMain };
const Family kForward = {8, "attention.h", [](const std::vector<DType>& d) {
                           return std::vector<std::string>{instance("widen_heads", d[0]),
                                                           instance("attention_fwd", d[0])};
                         }};

enum BackwardKernel { kBackwardWiden, kGradientOfQ, kGradientOfKv };
const Family kBackward = {9, "attention.h", [](const std::vector<DType>& d) {
                            return std::vector<std::string>{instance("widen_heads", d[0]),
                                                            instance("attention_bwd_q", d[0]),
                                                            instance("attention_bwd_kv", d[0])};
                          }};

// Rows of one side of the scores: data [B, n, H, D] and its strides in elements.
struct Heads {
  const void* data;
  int64_t batch, token, head;
};

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

int64_t block_rows(DType dtype, const Context& context) {
  const int vectors =
      dtype == DType::float64 ? tiles::AttentionTile<double>::vectors : tiles::AttentionTile<float>::vectors;
  return int64_t{vectors} * variant_of(context).lanes;
}

// Sub-groups that share out the blocks of `n` rows of every head.
template <class P>
int64_t units_for(const P& p, int64_t n) {
  return persistent_units(p.context, p.B * p.H * ceil_div(n, block_rows(p.dtype, p.context)));
}

template <class P>
int64_t widened_bytes(const P& p, int64_t n) {
  const DType acc = accumulator(p.dtype);
  return p.dtype == acc ? 0 : p.B * p.H * n * p.D * static_cast<int64_t>(size_of(acc));
}

// A copy of the rows in the accumulator type, times `factor`.
template <class P>
Heads copied(Call& call, const Bundle& bundle, int kernel, const P& p, const Heads& x, int64_t n, char* to,
             double factor) {
  const int64_t units = p.B * p.H * n;
  call.launch(bundle, kernel, units, x.data, static_cast<void*>(to), static_cast<int>(p.H), static_cast<int>(n),
              static_cast<int>(p.D), x.batch, x.token, x.head, factor, units);
  return {to, p.H * n * p.D, p.D, n * p.D};
}

// The rows in the accumulator type: themselves where they have it.
template <class P>
Heads widened(Call& call, const Bundle& bundle, int kernel, const P& p, const Heads& x, int64_t n, char* to) {
  return p.dtype == accumulator(p.dtype) ? x : copied(call, bundle, kernel, p, x, n, to, 1.0);
}

struct Forward {
  int64_t units;
  char *k, *v, *scratch;
  int64_t bytes;

  Forward(const AttentionFwd& p, char* base) : units(units_for(p, p.N)) {
    Arena arena{base};
    k = arena.take(widened_bytes(p, p.L));
    v = arena.take(widened_bytes(p, p.L));
    scratch = arena.take(units * (p.D + p.L) * block_rows(p.dtype, p.context) *
                         static_cast<int64_t>(size_of(accumulator(p.dtype))));
    bytes = arena.used;
  }
};

struct Backward {
  int64_t q_units, k_units;
  char *k, *v, *q, *dout, *delta, *scratch;
  int64_t bytes;

  Backward(const AttentionBwd& p, char* base) : q_units(units_for(p, p.N)), k_units(units_for(p, p.L)) {
    const int64_t acc = static_cast<int64_t>(size_of(accumulator(p.dtype)));
    Arena arena{base};
    k = arena.take(widened_bytes(p, p.L));
    v = arena.take(widened_bytes(p, p.L));
    q = arena.take(p.B * p.H * p.N * p.D * acc);
    dout = arena.take(widened_bytes(p, p.N));
    delta = arena.take(p.B * p.H * p.N * acc);
    scratch = arena.take(std::max(q_units * (2 * p.D + p.L), k_units * (2 * p.D + 2 * p.N)) *
                         block_rows(p.dtype, p.context) * acc);
    bytes = arena.used;
  }
};

int64_t span(int64_t B, int64_t n, int64_t H, int64_t D, int64_t batch, int64_t token, int64_t head) {
  return extent(B, batch, n, token, H, head, D, 1);
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
  const void* q = call.in(p.q, span(p.B, p.N, p.H, p.D, p.q_batch, p.q_token, p.q_head), size);
  const Heads k = widened(
      call, bundle, kForwardWiden, p,
      {call.in(p.k, span(p.B, p.L, p.H, p.D, p.k_batch, p.k_token, p.k_head), size), p.k_batch, p.k_token, p.k_head},
      p.L, f.k);
  const Heads v = widened(
      call, bundle, kForwardWiden, p,
      {call.in(p.v, span(p.B, p.L, p.H, p.D, p.v_batch, p.v_token, p.v_head), size), p.v_batch, p.v_token, p.v_head},
      p.L, f.v);
  call.launch(bundle, kForwardMain, f.units, q, k.data, v.data, call.out(p.out, p.B * p.N * p.H * p.D, size),
              call.out(p.lse, p.B * p.H * p.N, acc), static_cast<void*>(f.scratch), s.B, s.H, s.N, s.L, s.D, p.q_batch,
              p.q_token, p.q_head, k.batch, k.token, k.head, v.batch, v.token, v.head, p.scale, f.units);
  call.finish();
}

void attention_bwd(const AttentionBwd& p) {
  check(p);
  if (!p.B || !p.H || !p.D || (!p.N && !p.L)) return;
  Call call("attention_bwd", p.context);
  const Sizes s = sizes("attention_bwd", p);
  const std::size_t size = size_of(p.dtype), acc = size_of(accumulator(p.dtype));
  const Bundle& bundle = call.bundle(kBackward, {p.dtype});
  const Backward b(p, static_cast<char*>(call.scratch(p.workspace, attention_bwd_workspace(p))));
  const int64_t row = p.H * p.D;
  const Heads q{call.in(p.q, span(p.B, p.N, p.H, p.D, p.q_batch, p.q_token, p.q_head), size), p.q_batch, p.q_token,
                p.q_head};
  const Heads k{call.in(p.k, span(p.B, p.L, p.H, p.D, p.k_batch, p.k_token, p.k_head), size), p.k_batch, p.k_token,
                p.k_head};
  const Heads v{call.in(p.v, span(p.B, p.L, p.H, p.D, p.v_batch, p.v_token, p.v_head), size), p.v_batch, p.v_token,
                p.v_head};
  const Heads dout{call.in(p.dout, p.B * p.N * row, size), p.N * row, row, p.D};
  const void* out = call.in(p.out, p.B * p.N * row, size);
  const void* lse = call.in(p.lse, p.B * p.H * p.N, acc);
  void* dq = call.out(p.dq, span(p.B, p.N, p.H, p.D, p.dq_batch, p.dq_token, p.dq_head), size);
  void* dk = call.out(p.dk, span(p.B, p.L, p.H, p.D, p.dk_batch, p.dk_token, p.dk_head), size);
  void* dv = call.out(p.dv, span(p.B, p.L, p.H, p.D, p.dv_batch, p.dv_token, p.dv_head), size);
  void *delta = b.delta, *scratch = b.scratch;

  const Heads keys = widened(call, bundle, kBackwardWiden, p, k, p.L, b.k);
  const Heads values = widened(call, bundle, kBackwardWiden, p, v, p.L, b.v);
  call.launch(bundle, kGradientOfQ, b.q_units, dout.data, q.data, keys.data, values.data, out, lse, dq, delta, scratch,
              s.B, s.H, s.N, s.L, s.D, p.q_batch, p.q_token, p.q_head, keys.batch, keys.token, keys.head, values.batch,
              values.token, values.head, p.dq_batch, p.dq_token, p.dq_head, p.scale, b.q_units);
  const Heads queries = copied(call, bundle, kBackwardWiden, p, q, p.N, b.q, p.scale);
  const Heads gradients = widened(call, bundle, kBackwardWiden, p, dout, p.N, b.dout);
  call.launch(bundle, kGradientOfKv, b.k_units, gradients.data, queries.data, k.data, v.data, lse,
              static_cast<const void*>(delta), dk, dv, scratch, s.B, s.H, s.N, s.L, s.D, gradients.batch,
              gradients.token, gradients.head, queries.batch, queries.token, queries.head, p.k_batch, p.k_token,
              p.k_head, p.v_batch, p.v_token, p.v_head, p.dk_batch, p.dk_token, p.dk_head, p.dv_batch, p.dv_token,
              p.dv_head, b.k_units);
  call.finish();
}

std::size_t attention_fwd_workspace(const AttentionFwd& p) {
  return static_cast<std::size_t>(Forward(p, nullptr).bytes);
}

std::size_t attention_bwd_workspace(const AttentionBwd& p) {
  return static_cast<std::size_t>(Backward(p, nullptr).bytes);
}

}  // namespace vit
