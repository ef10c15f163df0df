// The only file that knows Python: each function takes the fields of its params struct, in order, as plain numbers
// (pointers as integers) and releases the GIL while the kernel runs. Compiled once per backend into vit._<backend>.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "vit.h"

namespace py = pybind11;
using namespace vit;

namespace {

using Pointer = std::uintptr_t;  // 0 is null

void* ptr(Pointer p) { return reinterpret_cast<void*>(p); }
DType dt(int code) { return static_cast<DType>(code); }
Activation act(int code) { return static_cast<Activation>(code); }

// A stream is passed as (pointer, device index, CPU threads, TF32 allowed), the fields of Context.
Context ctx(Pointer stream, int device, int num_threads, bool allow_tf32) {
  return {ptr(stream), device, num_threads, allow_tf32};
}

// Runs `f(params)` without the GIL; vit::Error becomes a Python RuntimeError by pybind11's own rule.
template <class F, class P>
auto run(F f, const P& params) {
  py::gil_scoped_release release;
  return f(params);
}

LayerNormFwd layer_norm_fwd_params(Pointer x, Pointer weight, Pointer bias, Pointer y, Pointer mean, Pointer rstd,
                                   int64_t M, int64_t C, int64_t x_stride, double eps, int dtype, int param_dtype,
                                   Pointer stream, int device, int num_threads, bool allow_tf32) {
  return {ptr(x),
          ptr(weight),
          ptr(bias),
          ptr(y),
          ptr(mean),
          ptr(rstd),
          M,
          C,
          x_stride,
          eps,
          dt(dtype),
          dt(param_dtype),
          ctx(stream, device, num_threads, allow_tf32)};
}

LayerNormBwd layer_norm_bwd_params(Pointer dy, Pointer x, Pointer weight, Pointer mean, Pointer rstd, Pointer dx,
                                   Pointer dweight, Pointer dbias, Pointer workspace, int64_t M, int64_t C,
                                   int64_t x_stride, int dtype, int param_dtype, Pointer stream, int device,
                                   int num_threads, bool allow_tf32) {
  return {ptr(dy), ptr(x),       ptr(weight), ptr(mean),       ptr(rstd),
          ptr(dx), ptr(dweight), ptr(dbias),  ptr(workspace),  M,
          C,       x_stride,     dt(dtype),   dt(param_dtype), ctx(stream, device, num_threads, allow_tf32)};
}

MatmulFwd matmul_fwd_params(Pointer a, Pointer b, Pointer c, Pointer workspace, int64_t batch, int64_t M, int64_t N,
                            int64_t K, int64_t a_batch, int64_t a_row, int64_t a_col, int64_t b_batch, int64_t b_row,
                            int64_t b_col, int dtype, Pointer stream, int device, int num_threads, bool allow_tf32) {
  return {
      ptr(a),  ptr(b), ptr(c), ptr(workspace), batch, M,     N,         K,
      a_batch, a_row,  a_col,  b_batch,        b_row, b_col, dt(dtype), ctx(stream, device, num_threads, allow_tf32)};
}

MatmulBwd matmul_bwd_params(Pointer dc, Pointer a, Pointer b, Pointer da, Pointer db, Pointer workspace, int64_t batch,
                            int64_t M, int64_t N, int64_t K, int64_t a_batch, int64_t a_row, int64_t a_col,
                            int64_t b_batch, int64_t b_row, int64_t b_col, int dtype, Pointer stream, int device,
                            int num_threads, bool allow_tf32) {
  return {ptr(dc), ptr(a),  ptr(b), ptr(da), ptr(db),   ptr(workspace),
          batch,   M,       N,      K,       a_batch,   a_row,
          a_col,   b_batch, b_row,  b_col,   dt(dtype), ctx(stream, device, num_threads, allow_tf32)};
}

LinearFwd linear_fwd_params(Pointer x, Pointer weight, Pointer bias, Pointer residual, Pointer y, Pointer preact,
                            Pointer workspace, int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t weight_stride,
                            int activation, int dtype, int param_dtype, int out_dtype, Pointer stream, int device,
                            int num_threads, bool allow_tf32) {
  return {ptr(x),
          ptr(weight),
          ptr(bias),
          ptr(residual),
          ptr(y),
          ptr(preact),
          ptr(workspace),
          M,
          N,
          K,
          x_stride,
          weight_stride,
          act(activation),
          dt(dtype),
          dt(param_dtype),
          dt(out_dtype),
          ctx(stream, device, num_threads, allow_tf32)};
}

LinearBwd linear_bwd_params(Pointer dy, Pointer x, Pointer weight, Pointer preact, Pointer dx, Pointer dweight,
                            Pointer dbias, Pointer workspace, int64_t M, int64_t N, int64_t K, int64_t x_stride,
                            int64_t weight_stride, int activation, int dtype, int param_dtype, int out_dtype,
                            Pointer stream, int device, int num_threads, bool allow_tf32) {
  return {ptr(dy),
          ptr(x),
          ptr(weight),
          ptr(preact),
          ptr(dx),
          ptr(dweight),
          ptr(dbias),
          ptr(workspace),
          M,
          N,
          K,
          x_stride,
          weight_stride,
          act(activation),
          dt(dtype),
          dt(param_dtype),
          dt(out_dtype),
          ctx(stream, device, num_threads, allow_tf32)};
}

AttentionFwd attention_fwd_params(Pointer q, Pointer k, Pointer v, Pointer out, Pointer lse, Pointer workspace,
                                  int64_t B, int64_t N, int64_t L, int64_t H, int64_t D, int64_t q_batch,
                                  int64_t q_token, int64_t q_head, int64_t k_batch, int64_t k_token, int64_t k_head,
                                  int64_t v_batch, int64_t v_token, int64_t v_head, double scale, int dtype,
                                  Pointer stream, int device, int num_threads, bool allow_tf32) {
  return {ptr(q),
          ptr(k),
          ptr(v),
          ptr(out),
          ptr(lse),
          ptr(workspace),
          B,
          N,
          L,
          H,
          D,
          q_batch,
          q_token,
          q_head,
          k_batch,
          k_token,
          k_head,
          v_batch,
          v_token,
          v_head,
          scale,
          dt(dtype),
          ctx(stream, device, num_threads, allow_tf32)};
}

AttentionBwd attention_bwd_params(Pointer dout, Pointer q, Pointer k, Pointer v, Pointer out, Pointer lse, Pointer dq,
                                  Pointer dk, Pointer dv, Pointer workspace, int64_t B, int64_t N, int64_t L, int64_t H,
                                  int64_t D, int64_t q_batch, int64_t q_token, int64_t q_head, int64_t k_batch,
                                  int64_t k_token, int64_t k_head, int64_t v_batch, int64_t v_token, int64_t v_head,
                                  int64_t dq_batch, int64_t dq_token, int64_t dq_head, int64_t dk_batch,
                                  int64_t dk_token, int64_t dk_head, int64_t dv_batch, int64_t dv_token,
                                  int64_t dv_head, double scale, int dtype, Pointer stream, int device, int num_threads,
                                  bool allow_tf32) {
  return {ptr(dout), ptr(q),   ptr(k),  ptr(v),         ptr(out),  ptr(lse),
          ptr(dq),   ptr(dk),  ptr(dv), ptr(workspace), B,         N,
          L,         H,        D,       q_batch,        q_token,   q_head,
          k_batch,   k_token,  k_head,  v_batch,        v_token,   v_head,
          dq_batch,  dq_token, dq_head, dk_batch,       dk_token,  dk_head,
          dv_batch,  dv_token, dv_head, scale,          dt(dtype), ctx(stream, device, num_threads, allow_tf32)};
}

// Binds name(fields...) and, for kernels that need one, name_workspace(fields...) -> bytes.
template <class P, class... A>
void def(py::module_& m, const char* name, P (*params)(A...), void (*kernel)(const P&),
         std::size_t (*workspace)(const P&) = nullptr) {
  m.def(name, [=](A... fields) { run(kernel, params(fields...)); });
  if (workspace)
    m.def((std::string(name) + "_workspace").c_str(), [=](A... fields) { return workspace(params(fields...)); });
}

GeluFwd gelu_fwd_params(Pointer x, Pointer y, int64_t n, int activation, int dtype, Pointer stream, int device,
                        int num_threads, bool allow_tf32) {
  return {ptr(x), ptr(y), n, act(activation), dt(dtype), ctx(stream, device, num_threads, allow_tf32)};
}

GeluBwd gelu_bwd_params(Pointer dy, Pointer x, Pointer dx, int64_t n, int activation, int dtype, Pointer stream,
                        int device, int num_threads, bool allow_tf32) {
  return {ptr(dy), ptr(x), ptr(dx), n, act(activation), dt(dtype), ctx(stream, device, num_threads, allow_tf32)};
}

}  // namespace

PYBIND11_MODULE(VIT_MODULE, m) {
  m.attr("contract") = kContract;
  m.def("info", &info);
  def(m, "layer_norm_fwd", layer_norm_fwd_params, layer_norm_fwd);
  def(m, "layer_norm_bwd", layer_norm_bwd_params, layer_norm_bwd, layer_norm_bwd_workspace);
  def(m, "gelu_fwd", gelu_fwd_params, gelu_fwd);
  def(m, "gelu_bwd", gelu_bwd_params, gelu_bwd);
  def(m, "matmul_fwd", matmul_fwd_params, matmul_fwd, matmul_fwd_workspace);
  def(m, "matmul_bwd", matmul_bwd_params, matmul_bwd, matmul_bwd_workspace);
  def(m, "linear_fwd", linear_fwd_params, linear_fwd, linear_fwd_workspace);
  def(m, "linear_bwd", linear_bwd_params, linear_bwd, linear_bwd_workspace);
  def(m, "attention_fwd", attention_fwd_params, attention_fwd, attention_fwd_workspace);
  def(m, "attention_bwd", attention_bwd_params, attention_bwd, attention_bwd_workspace);
}
