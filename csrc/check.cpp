#include "check.h"

#include <initializer_list>

namespace vit {

// Weak, as in bindings.cpp: a backend without attention has no check called that asks for them.
__attribute__((weak)) std::size_t attention_fwd_workspace(const AttentionFwd&);
__attribute__((weak)) std::size_t attention_bwd_workspace(const AttentionBwd&);
__attribute__((weak)) std::size_t attention_rows_workspace(const AttentionRows&);

namespace {

[[noreturn]] void fail(const char* op, const std::string& text) { throw Error(std::string(op) + ": " + text); }

std::string name(DType dtype) {
#define VIT_NAME(name, value) \
  case DType::name:           \
    return #name;
  switch (dtype) { VIT_DTYPES(VIT_NAME) }
#undef VIT_NAME
  return "unknown dtype " + std::to_string(static_cast<int>(dtype));
}

void check_dtype(const char* op, DType dtype) {
  if (!takes(dtype)) fail(op, "dtype is " + name(dtype) + "; " + kTakes);
}

void check_other_dtype(const char* op, const char* argument, DType other, DType dtype) {
  if (other != dtype && other != DType::float32)
    fail(op, std::string(argument) + " is " + name(other) + "; allowed beside dtype " + name(dtype) + " are " +
                 name(dtype) + " and float32");
}

bool known(Activation activation) {
#define VIT_KNOWN(name, value) case Activation::name:
  switch (activation) { VIT_ACTIVATIONS(VIT_KNOWN) return true; }
#undef VIT_KNOWN
  return false;
}

void check_activation(const char* op, Activation activation, bool none) {
  if (known(activation) && (none || activation != Activation::none)) return;
  std::string allowed;
#define VIT_LIST(name, value) \
  if (none || value) allowed += (allowed.empty() ? "" : ", ") + std::to_string(value) + " (" #name ")";
  VIT_ACTIVATIONS(VIT_LIST)
#undef VIT_LIST
  fail(op, "activation is " + std::to_string(static_cast<int>(activation)) + "; allowed are " + allowed);
}

void check_pairing(const char* op, Pairing pairing) {
#define VIT_KNOWN(name, value) case Pairing::name:
  switch (pairing) { VIT_PAIRINGS(VIT_KNOWN) return; }
#undef VIT_KNOWN
  std::string allowed;
#define VIT_LIST(name, value) allowed += (allowed.empty() ? "" : ", ") + std::to_string(value) + " (" #name ")";
  VIT_PAIRINGS(VIT_LIST)
#undef VIT_LIST
  fail(op, "pairing is " + std::to_string(static_cast<int>(pairing)) + "; allowed are " + allowed);
}

void check_context(const char* op, const Context& context) {
  if (context.num_threads < 1)
    fail(op, "num_threads is " + std::to_string(context.num_threads) + "; at least 1 is needed");
}

struct Size {
  const char* name;
  int64_t value;
};

void check_sizes(const char* op, std::initializer_list<Size> sizes) {
  for (const Size& size : sizes)
    if (size.value < 0)
      fail(op, std::string(size.name) + " is " + std::to_string(size.value) + "; a size is 0 or more");
}

struct Pointer {
  const char* name;
  const void* value;
  bool needed;
};

void check_pointers(const char* op, std::initializer_list<Pointer> pointers) {
  for (const Pointer& pointer : pointers)
    if (pointer.needed && !pointer.value) fail(op, std::string(pointer.name) + " is null");
}

void check_rotary(const char* op, int64_t N, int64_t D, int64_t prefix) {
  if (D % 2) fail(op, "D is " + std::to_string(D) + "; pairs need an even one");
  if (prefix > N) fail(op, "prefix is " + std::to_string(prefix) + "; there are " + std::to_string(N) + " tokens");
}

void check_8_bit(const char* op, const Linear8Bit& p, const char* why) {
  check_dtype(op, p.dtype);
  if (p.dtype == DType::float64) fail(op, "dtype is float64; allowed are float32, bfloat16 and float16");
  check_other_dtype(op, "out_dtype", p.out_dtype, p.dtype);
  check_activation(op, p.activation, true);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"N", p.N}, {"K", p.K}});
  if (p.K > kMost8Bit)
    fail(op, "K is " + std::to_string(p.K) + "; at most " + std::to_string(kMost8Bit) + " products of " + why);
  const bool work = p.M && p.N;
  check_pointers(op, {{"x", p.x, work && p.K},
                      {"weight", p.weight, work && p.K},
                      {"weight_scale", p.weight_scale, work},
                      {"y", p.y, work},
                      {"workspace", p.workspace, work}});
}

}  // namespace

void check(const LayerNormFwd& p) {
  const char* op = "layer_norm_fwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"C", p.C}});
  const bool work = p.M && p.C;
  check_pointers(op, {{"x", p.x, work}, {"y", p.y, work}, {"rstd (beside mean)", p.rstd, p.mean && work}});
}

void check(const LayerNormBwd& p) {
  const char* op = "layer_norm_bwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"C", p.C}});
  const bool work = p.M && p.C;
  check_pointers(op, {{"dy", p.dy, work},
                      {"x", p.x, work},
                      {"mean", p.mean, p.M > 0},
                      {"rstd", p.rstd, p.M > 0},
                      {"workspace", p.workspace, work && (p.dweight || p.dbias)}});
}

void check(const RmsNormFwd& p) {
  const char* op = "rms_norm_fwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"C", p.C}});
  const bool work = p.M && p.C;
  check_pointers(op, {{"x", p.x, work}, {"y", p.y, work}});
}

void check(const RmsNormBwd& p) {
  const char* op = "rms_norm_bwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"C", p.C}});
  const bool work = p.M && p.C;
  check_pointers(
      op,
      {{"dy", p.dy, work}, {"x", p.x, work}, {"rstd", p.rstd, p.M > 0}, {"workspace", p.workspace, work && p.dweight}});
}

void check(const GeluFwd& p) {
  const char* op = "gelu_fwd";
  check_dtype(op, p.dtype);
  check_activation(op, p.activation, false);
  check_context(op, p.context);
  check_sizes(op, {{"n", p.n}});
  check_pointers(op, {{"x", p.x, p.n > 0}, {"y", p.y, p.n > 0}});
}

void check(const GeluBwd& p) {
  const char* op = "gelu_bwd";
  check_dtype(op, p.dtype);
  check_activation(op, p.activation, false);
  check_context(op, p.context);
  check_sizes(op, {{"n", p.n}});
  check_pointers(op, {{"dy", p.dy, p.n > 0}, {"x", p.x, p.n > 0}, {"dx", p.dx, p.n > 0}});
}

void check(const SwigluFwd& p) {
  const char* op = "swiglu_fwd";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"C", p.C}});
  const bool work = p.M && p.C;
  check_pointers(op, {{"x", p.x, work}, {"gate", p.gate, work}, {"y", p.y, work}});
}

void check(const SwigluBwd& p) {
  const char* op = "swiglu_bwd";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"C", p.C}});
  const bool work = p.M && p.C;
  check_pointers(
      op, {{"dy", p.dy, work}, {"x", p.x, work}, {"gate", p.gate, work}, {"dx", p.dx, work}, {"dgate", p.dgate, work}});
}

void check(const MatmulFwd& p) {
  const char* op = "matmul_fwd";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"batch", p.batch}, {"M", p.M}, {"N", p.N}, {"K", p.K}});
  const bool out = p.batch && p.M && p.N;
  check_pointers(op, {{"a", p.a.data, out && p.K}, {"b", p.b.data, out && p.K}, {"c", p.c, out}});
}

void check(const MatmulBwd& p) {
  const char* op = "matmul_bwd";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"batch", p.batch}, {"M", p.M}, {"N", p.N}, {"K", p.K}});
  const bool work = p.batch && p.M && p.N && p.K;
  check_pointers(op, {{"dc", p.dc, work}, {"a", p.a.data, work && p.db}, {"b", p.b.data, work && p.da}});
}

void check(const LinearFwd& p) {
  const char* op = "linear_fwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_other_dtype(op, "out_dtype", p.out_dtype, p.dtype);
  check_activation(op, p.activation, true);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"N", p.N}, {"K", p.K}});
  const bool out = p.M && p.N;
  check_pointers(op, {{"x", p.x, out && p.K}, {"weight", p.weight, out && p.K}, {"y", p.y, out}});
}

void check(const LinearBwd& p) {
  const char* op = "linear_bwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_other_dtype(op, "out_dtype", p.out_dtype, p.dtype);
  check_activation(op, p.activation, true);
  check_context(op, p.context);
  check_sizes(op, {{"M", p.M}, {"N", p.N}, {"K", p.K}});
  const bool work = p.M && p.N;
  const bool activation = p.activation != Activation::none;
  if (!activation && !p.dscale && p.preact)
    fail(op, "preact is given although activation is 0 (none) and dscale is null");
  check_pointers(op, {{"dy", p.dy, work},
                      {"preact", p.preact, work && (activation || p.dscale)},
                      {"x", p.x, work && p.K && p.dweight},
                      {"weight", p.weight, work && p.K && p.dx}});
}

void check(const RotaryFwd& p) {
  const char* op = "rotary_fwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_pairing(op, p.pairing);
  check_context(op, p.context);
  check_sizes(op, {{"B", p.B}, {"N", p.N}, {"H", p.H}, {"D", p.D}, {"prefix", p.prefix}});
  check_rotary(op, p.N, p.D, p.prefix);
  const bool work = p.B && p.N && p.H && p.D;
  check_pointers(op, {{"x", p.x.data, work}, {"table", p.table.data, work && p.prefix < p.N}, {"y", p.y.data, work}});
}

void check(const RotaryBwd& p) {
  const char* op = "rotary_bwd";
  check_dtype(op, p.dtype);
  check_other_dtype(op, "param_dtype", p.param_dtype, p.dtype);
  check_pairing(op, p.pairing);
  check_context(op, p.context);
  check_sizes(op, {{"B", p.B}, {"N", p.N}, {"H", p.H}, {"D", p.D}, {"prefix", p.prefix}});
  check_rotary(op, p.N, p.D, p.prefix);
  if (p.table_B != 1 && p.table_B != p.B)
    fail(op, "table_B is " + std::to_string(p.table_B) + "; allowed are 1 and B, " + std::to_string(p.B));
  if (p.table_H != 1 && p.table_H != p.H)
    fail(op, "table_H is " + std::to_string(p.table_H) + "; allowed are 1 and H, " + std::to_string(p.H));
  const bool work = p.B && p.N && p.H && p.D, turned = work && p.prefix < p.N;
  check_pointers(
      op, {{"dy", p.dy.data, work}, {"x", p.x.data, turned && p.dtable}, {"table", p.table.data, turned && p.dx.data}});
}

void check(const AttentionFwd& p) {
  const char* op = "attention_fwd";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"B", p.B}, {"N", p.N}, {"L", p.L}, {"H", p.H}, {"D", p.D}});
  const bool rows = p.B && p.N && p.H, out = rows && p.D;
  check_pointers(op, {{"q", p.q.data, out},
                      {"k", p.k.data, out && p.L},
                      {"v", p.v.data, out && p.L},
                      {"out", p.out, out},
                      {"workspace", p.workspace, rows && !p.workspace && attention_fwd_workspace(p) > 0}});
}

void check(const AttentionBwd& p) {
  const char* op = "attention_bwd";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"B", p.B}, {"N", p.N}, {"L", p.L}, {"H", p.H}, {"D", p.D}});
  const bool rows = p.B && p.N && p.H, columns = p.B && p.L && p.H;
  const bool queries = rows && p.D, keys = columns && p.D;
  check_pointers(op, {{"dout", p.dout, queries},
                      {"q", p.q.data, queries},
                      {"out", p.out, queries},
                      {"stats", p.stats, rows},
                      {"dq", p.dq.data, queries},
                      {"k", p.k.data, keys},
                      {"v", p.v.data, keys},
                      {"dk", p.dk.data, keys},
                      {"dv", p.dv.data, keys},
                      {"workspace", p.workspace, (rows || columns) && !p.workspace && attention_bwd_workspace(p) > 0}});
}

void check(const AttentionRows& p) {
  const char* op = "attention_rows";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"B", p.B}, {"N", p.N}, {"R", p.R}, {"L", p.L}, {"H", p.H}, {"D", p.D}});
  if (!p.queries && p.R > p.N)
    fail(op, "R is " + std::to_string(p.R) + "; without queries it is at most N, " + std::to_string(p.N));
  const bool work = p.B && p.R && p.L && p.H;
  check_pointers(op, {{"q", p.q.data, work && p.D},
                      {"k", p.k.data, work && p.D},
                      {"rows", p.rows.data, work},
                      {"workspace", p.workspace, work && !p.workspace && attention_rows_workspace(p) > 0}});
}

void check(const LinearInt8& p) { check_8_bit("linear_int8", p, "bytes fit 32 bits"); }
void check(const LinearFp8& p) { check_8_bit("linear_fp8", p, "e4m3 are exact in float64"); }

void check(const Move& p) {
  const char* op = "move";
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"leads", p.leads}, {"terms", p.terms}});
  int64_t count = 1;
  for (const int64_t size : p.sizes) {
    check_sizes(op, {{"sizes", size}});
    count *= size;
  }
  if (p.leads > p.sizes[1])
    fail(op, "leads is " + std::to_string(p.leads) + "; dimension 1 has " + std::to_string(p.sizes[1]));
  check_pointers(op, {{"out", p.out, count > 0}});
}

namespace {

template <class Params>
void check_adamw(const char* op, const Params& p) {
  check_dtype(op, p.dtype);
  check_context(op, p.context);
  check_sizes(op, {{"n", p.n}});
  const bool packed = p.exp_avg_scale || p.exp_avg_sq_scale;
  if (packed && p.dtype == DType::float64)
    fail(op, "dtype is float64; averages of 8 bits go with 16 and 32 bits alone");
  check_pointers(op, {{"param", p.param, p.n > 0},
                      {"grad", p.grad, p.n > 0},
                      {"exp_avg", p.exp_avg, p.n > 0},
                      {"exp_avg_sq", p.exp_avg_sq, p.n > 0},
                      {"exp_avg_scale", p.exp_avg_scale, packed && p.n > 0},
                      {"exp_avg_sq_scale", p.exp_avg_sq_scale, packed && p.n > 0},
                      {"code", p.code, packed && p.n > 0}});
}

}  // namespace

void check(const AdamW& p) { check_adamw("adamw", p); }

void check(const AdamWCaptured& p) {
  check_adamw("adamw_captured", p);
  check_pointers("adamw_captured", {{"numbers", p.numbers, p.n > 0}});
}

}  // namespace vit
