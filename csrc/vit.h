// The native contract of vit: one plain struct and one function per op and direction; ops.def is the list of them.
//
// Every backend (csrc/<backend>/) defines the functions declared here, or those it has; bindings.cpp exposes them to
// Python under the same names. Neither torch nor Python is known below this line: NumPy, torch and C++
// callers are equal.
//
// Letters      B batch, N tokens (queries), L tokens (keys), H heads, D head dimension, C channels, M rows.
//              For products M, N, K are the usual sizes: [M, K] x [K, N].
// Pointers     carry their shape; "may be null" says what null means. Unless strides are given, memory is contiguous.
// Strides      in elements, never bytes.
// dtype        of activations. param_dtype is the type of weights, biases and their gradients: dtype or float32.
//              out_dtype (linear) is the type of residual, y and dy: dtype or float32.
// acc          the accumulator type of a dtype: float64 for float64, else float32. Statistics (mean, rstd, stats)
//              have it.
// Ownership    the caller owns all memory, the workspace included: <op>_<direction>_workspace(params) says how many
//              bytes (64-byte aligned) and looks at sizes, strides, dtypes, context and whether linear has a scale,
//              never at other pointers.
// Behaviour    kernels never allocate device memory, print, exit or synchronise. A bad argument throws vit::Error with
//              the op, the name and the value. Results depend neither on num_threads nor on what else is in the batch:
//              the order of every sum follows from N, K, dtype and architecture alone. No atomics on results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "codes.h"

namespace vit {

// Raised by one whenever a struct or function below changes: Python refuses a module built from another number. A new
// op changes nothing of the others; a module without it lacks that op alone.
inline constexpr int kContract = 5;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Context {
  void* stream = nullptr;   // cudaStream_t or sycl::queue*; null on the CPU
  int32_t device = 0;       // device index of the stream
  int32_t num_threads = 1;  // CPU threads this call may use; 1 never touches a thread pool
  bool allow_tf32 = false;  // float32 products may round their inputs to TF32 (10 fraction bits); CUDA only
};

// A batch of matrices: element (i, row, column) lies i * batch + row * row + column * col after data. Any strides, also
// zero (a broadcast batch) and those of a transposed matrix.
struct Matrix {
  const void* data;
  int64_t batch, row, col;
};

// Vectors of one head each: element d of head h of token n of sample b lies b * batch + n * token + h * head + d after
// data, so that a packed [B, N, 3, H, D] projection is read, and its gradient written, in place.
template <class Data>
struct HeadsOf {
  Data data;
  int64_t batch, token, head;
};
using Heads = HeadsOf<const void*>;
using MutableHeads = HeadsOf<void*>;

// Up to 6 dimensions of an array: element i lies sum over d of i[d] * strides[d] after data.
struct View {
  const void* data;
  int64_t strides[6];
};

// layer_norm: y = (x - mean) * rstd * weight + bias over the last dimension, rstd = 1 / sqrt(var + eps).
struct LayerNormFwd {
  const void* x;       // [M, C] rows x_stride apart, elements of a row adjacent
  const void* weight;  // [C] param_dtype, may be null: 1
  const void* bias;    // [C] param_dtype, may be null: 0
  void* y;             // [M, C]
  void* mean;          // [M] acc, may be null: not wanted
  void* rstd;          // [M] acc, null when mean is
  int64_t M, C, x_stride;
  double eps;
  DType dtype, param_dtype;
  Context context;
};

struct LayerNormBwd {
  const void* dy;      // [M, C]
  const void* x;       // [M, C] rows x_stride apart
  const void* weight;  // [C] param_dtype, may be null: 1
  const void* mean;    // [M] acc
  const void* rstd;    // [M] acc
  void* dx;            // [M, C], may be null: not wanted
  void* dweight;       // [C] param_dtype, may be null
  void* dbias;         // [C] param_dtype, may be null
  void* workspace;     // layer_norm_bwd_workspace bytes
  int64_t M, C, x_stride;
  DType dtype, param_dtype;
  Context context;
};

// rms_norm: y = x * rstd * weight over the last dimension, rstd = 1 / sqrt(mean(x^2) + eps).
struct RmsNormFwd {
  const void* x;       // [M, C] rows x_stride apart, elements of a row adjacent
  const void* weight;  // [C] param_dtype, may be null: 1
  void* y;             // [M, C]
  void* rstd;          // [M] acc, may be null: not wanted
  int64_t M, C, x_stride;
  double eps;
  DType dtype, param_dtype;
  Context context;
};

struct RmsNormBwd {
  const void* dy;      // [M, C]
  const void* x;       // [M, C] rows x_stride apart
  const void* weight;  // [C] param_dtype, may be null: 1
  const void* rstd;    // [M] acc
  void* dx;            // [M, C], may be null: not wanted
  void* dweight;       // [C] param_dtype, may be null
  void* workspace;     // rms_norm_bwd_workspace bytes
  int64_t M, C, x_stride;
  DType dtype, param_dtype;
  Context context;
};

// gelu: y = x * F(x), F the normal distribution function or what an Activation has in its place (codes.h).
struct GeluFwd {
  const void* x;  // [n]
  void* y;        // [n]
  int64_t n;
  Activation activation;
  DType dtype;
  Context context;
};

struct GeluBwd {
  const void* dy;  // [n]
  const void* x;   // [n]
  void* dx;        // [n]
  int64_t n;
  Activation activation;
  DType dtype;
  Context context;
};

// swiglu: y = silu(gate) * x, silu(g) = g / (1 + exp(-g)). x and gate may be the halves of one packed projection.
struct SwigluFwd {
  const void* x;     // [M, C] rows x_stride apart, elements of a row adjacent
  const void* gate;  // [M, C] rows gate_stride apart
  void* y;           // [M, C]
  int64_t M, C, x_stride, gate_stride;
  DType dtype;
  Context context;
};

struct SwigluBwd {
  const void* dy;    // [M, C]
  const void* x;     // [M, C] rows x_stride apart
  const void* gate;  // [M, C] rows gate_stride apart
  void* dx;          // [M, C] rows dx_stride apart; both gradients are always computed
  void* dgate;       // [M, C] rows dgate_stride apart
  int64_t M, C, x_stride, gate_stride, dx_stride, dgate_stride;
  DType dtype;
  Context context;
};

// matmul: c = a b for each of `batch` pairs.
struct MatmulFwd {
  Matrix a;         // [batch, M, K]
  Matrix b;         // [batch, K, N]
  void* c;          // [batch, M, N]
  void* workspace;  // matmul_fwd_workspace bytes
  int64_t batch, M, N, K;
  DType dtype;
  Context context;
};

struct MatmulBwd {
  const void* dc;   // [batch, M, N]
  Matrix a;         // [batch, M, K]
  Matrix b;         // [batch, K, N]
  void* da;         // [batch, M, K], may be null: not wanted
  void* db;         // [batch, K, N], may be null
  void* workspace;  // matmul_bwd_workspace bytes
  int64_t batch, M, N, K;
  DType dtype;
  Context context;
};

// linear: y = scale * activation(x weight^T + bias) + residual.
struct LinearFwd {
  const void* x;         // [M, K] rows x_stride apart
  const void* weight;    // [N, K] param_dtype, rows weight_stride apart
  const void* bias;      // [N] param_dtype, may be null: 0
  const void* scale;     // [N] acc, may be null: 1
  const void* residual;  // [M, N] out_dtype, may be null: 0
  void* y;               // [M, N] out_dtype; may be the residual itself
  void* preact;          // [M, N] dtype: x weight^T + bias, kept for the backward; may be null: not wanted
  void* workspace;       // linear_fwd_workspace bytes
  int64_t M, N, K;
  int64_t x_stride, weight_stride;
  Activation activation;
  DType dtype, param_dtype, out_dtype;
  Context context;
};

// The gradient of the residual is dy itself and is not computed.
struct LinearBwd {
  const void* dy;      // [M, N] out_dtype
  const void* x;       // [M, K] rows x_stride apart; may be null when dweight is
  const void* weight;  // [N, K] param_dtype, rows weight_stride apart; may be null when dx is
  const void* scale;   // [N] acc, may be null: 1
  const void* preact;  // [M, N] dtype, null exactly when activation is none and dscale is null
  void* dx;            // [M, K] dtype, may be null: not wanted
  void* dweight;       // [N, K] param_dtype, may be null
  void* dbias;         // [N] param_dtype, may be null
  void* dscale;        // [N] acc, may be null
  void* workspace;     // linear_bwd_workspace bytes
  int64_t M, N, K;
  int64_t x_stride, weight_stride;
  Activation activation;
  DType dtype, param_dtype, out_dtype;
  Context context;
};

// rotary: y = x cos + r(x) sin, where r gives each pair (a, b) of a head's elements as (-b, a); the first `prefix`
// tokens are copied. The table holds D sines and D cosines for each of the other tokens, behind each other; a stride of
// 0 over B or H shares one among them.
struct RotaryFwd {
  Heads x;         // [B, N, H, D], D even
  Heads table;     // [B, N - prefix, H, 2 D] param_dtype
  MutableHeads y;  // [B, N, H, D]; may be x itself
  int64_t B, N, H, D, prefix;
  Pairing pairing;
  DType dtype, param_dtype;
  Context context;
};

struct RotaryBwd {
  Heads dy;         // [B, N, H, D]
  Heads x;          // [B, N, H, D]; may be null when dtable is
  Heads table;      // [B, N - prefix, H, 2 D] param_dtype
  MutableHeads dx;  // [B, N, H, D], may be null: not wanted; may be dy itself when dtable is null
  void* dtable;     // [table_B, table_H, N - prefix, 2 D] param_dtype, may be null
  int64_t B, N, H, D;
  int64_t table_B, table_H;  // 1, or B and H: how many samples and heads have a table of their own
  int64_t prefix;
  Pairing pairing;
  DType dtype, param_dtype;
  Context context;
};

// attention: out = softmax(scale q k^T) v for each batch and head.
//
// stats [B, H, 2, N]: of the softmax of each query the largest score m, then 1 / l with l = sum_j exp(s_j - m). The
// backward takes p_j = exp(s_j - m) / l from them, with the rounding of a softmax; the log-sum-exp, one number, would
// be rounded at the size of the scores, and every p of its row with it. m is in the units in which the forward
// subtracts (before or after the scale, base e or 2), so that both directions have the same differences: a backend
// reads its own.
struct AttentionFwd {
  Heads q;          // [B, N, H, D]
  Heads k;          // [B, L, H, D]
  Heads v;          // [B, L, H, D]
  void* out;        // [B, N, H, D]
  void* stats;      // [B, H, 2, N] acc; may be null: not wanted
  void* workspace;  // attention_fwd_workspace bytes
  int64_t B, N, L, H, D;
  double scale;
  DType dtype;
  Context context;
};

struct AttentionBwd {
  const void* dout;   // [B, N, H, D]
  Heads q;            // [B, N, H, D]
  Heads k;            // [B, L, H, D]
  Heads v;            // [B, L, H, D]
  const void* out;    // [B, N, H, D]
  const void* stats;  // [B, H, 2, N] acc
  MutableHeads dq;    // [B, N, H, D]; all three gradients are always computed
  MutableHeads dk;    // [B, L, H, D]
  MutableHeads dv;    // [B, L, H, D]
  void* workspace;    // attention_bwd_workspace bytes
  int64_t B, N, L, H, D;
  double scale;
  DType dtype;
  Context context;
};

// attention_rows: rows = softmax(scale q k^T) of R chosen queries of every head, what attention multiplies v with, for
// those who look at it. A routine.
struct AttentionRows {
  Heads q;              // [B, N, H, D]
  Heads k;              // [B, L, H, D]
  const void* queries;  // [R] int64: tokens of q, 0 to N - 1 in any order; may be null: 0 to R - 1
  MutableHeads rows;    // [B, R, H, L] acc: element j of a row is the probability of key j
  void* workspace;      // attention_rows_workspace bytes
  int64_t B, N, R, L, H, D;
  double scale;
  DType dtype;
  Context context;
};

// move: out = [lead; a] along dimension 1, plus b: views made contiguous, tokens put together, gradients added up.
// A routine: backends whose threads are those of PyTorch's own copies need none.
struct Move {
  View a;     // [n0, n1 - leads, n2, ..., n5], may be null: zeros
  View lead;  // [n0, leads, n2, ..., n5], may be null: zeros
  View b;     // [n0, n1, n2, ..., n5], may be null: zeros
  void* out;  // [n0, n1, n2, ..., n5]
  int64_t sizes[6];
  int64_t leads;
  int64_t terms, term;  // instead of a the sum of `terms` of them, `term` elements apart, in blocks of 16 and in order
  double divisor;       // and that divided by this
  DType dtype;
  Context context;
};

// linear_int8, linear_fp8: y = scale * activation(x weight^T + bias) + residual from products of numbers of 8 bits, the
// largest of which is L:
//
//   x_scale = max |x| of the row / L;  q = x / x_scale, rounded half to even;  x weight^T = (sum of q weight) x_scale
//   weight_scale
//
// all in float32, division and rounding exactly as written. A row whose largest |x| is below 2^-100 has the scale 1;
// one that holds a NaN or an infinity gives NaN. Routines.
struct Linear8Bit {
  const void* x;             // [M, K] rows x_stride apart, no float64
  const void* weight;        // [N, K] bytes, rows weight_stride apart
  const void* weight_scale;  // [N] float32
  const void* bias;          // [N] float32, may be null: 0
  const void* scale;         // [N] float32, may be null: 1
  const void* residual;      // [M, N] out_dtype, may be null: 0
  void* y;                   // [M, N] out_dtype; may be the residual itself
  void* workspace;           // linear_int8_workspace or linear_fp8_workspace bytes
  int64_t M, N, K;           // K at most kMost8Bit
  int64_t x_stride, weight_stride;
  Activation activation;
  DType dtype, out_dtype;
  Context context;
};
inline constexpr int64_t kMost8Bit = 131072;  // products of int8 fit 32 bits, those of e4m3 are exact in float64

// L = 127; signed bytes from -127 to 127. The sums are those of integers, the same on every backend.
struct LinearInt8 : Linear8Bit {};

// L = 448; e4m3: a sign, 4 bits of exponent with bias 7, 3 of fraction, no infinity; 0x7f and 0xff are NaN, which gives
// NaN. Products are exact, their sum is within 36 2^-13 (sum of |q weight|) of the exact one (docs/quantization.md).
struct LinearFp8 : Linear8Bit {};

// adamw: one step of Adam with decoupled weight decay, of n parameters in place:
//   g = grad_scale grad,  m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
//   param <- (1 - lr weight_decay) param - lr / correction1 m / (sqrt(v) / sqrt(correction2) + eps)
//   ema <- ema_decay ema + (1 - ema_decay) param
// With scales, m and sqrt(v) are in 8 bits: indices of `code`, times the scale of their block of 256.
struct AdamW {
  void* param;             // [n] dtype
  const void* grad;        // [n] dtype
  void* exp_avg;           // [n] m: acc, or uint8 with scales
  void* exp_avg_sq;        // [n] v: acc, or uint8 of sqrt(v) with scales
  void* exp_avg_scale;     // [ceil(n / 256)] float32, may be null: m and v are numbers; not with float64
  void* exp_avg_sq_scale;  // [ceil(n / 256)] float32, null when exp_avg_scale is
  void* ema;               // [n] acc, may be null: not wanted
  const void* code;        // [2, 256] float32, ascending, of numbers with a sign and without; null when the scales are
  int64_t n;
  double lr, beta1, beta2, eps, weight_decay;
  double correction1, correction2;  // 1 - beta1^t, 1 - beta2^t
  double grad_scale, ema_decay;
  DType dtype;
  Context context;
};
inline constexpr int64_t kAdamWBlock = 256;  // numbers of 8 bits that share a scale

// The same step with what differs from one to the next in memory of the device, read when the step runs: a graph of it
// would repeat the numbers of an AdamW for ever.
struct AdamWCaptured {
  void* param;  // as in AdamW, down to `code`
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* exp_avg_scale;
  void* exp_avg_sq_scale;
  void* ema;
  const void* code;
  const void* numbers;  // [4] acc: 1 - lr weight_decay, lr / correction1, sqrt(correction2), grad_scale
  int64_t n;
  double beta1, beta2, eps, ema_decay;
  DType dtype;
  Context context;
};

#define VIT_OP(name, Params, ...) void name(const Params&);
#define VIT_ROUTINE(name, Params, ...) __attribute__((weak)) void name(const Params&);
#define VIT_WORKSPACE(name, Params) std::size_t name##_workspace(const Params&);
#include "ops.def"

// What this build is and what it found on this machine ("isa", "threads", "compiler", ...), shown by `vit info`.
std::vector<std::pair<std::string, std::string>> info();

}  // namespace vit
