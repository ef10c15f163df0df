// rms_norm on the device: sizes to launches (kernels: kernels/rms_norm.h).
#include <algorithm>

#include "check.h"
#include "runtime.h"

namespace vit {
namespace {

using namespace device;

std::string types(const std::vector<DType>& d) {
  return std::string("<") + type_name(d[0]) + ", " + type_name(d[1]) + ">";
}

const Family kForward = {
    12, "rms_norm.h", [](const std::vector<DType>& d) { return std::vector<std::string>{"rms_norm_fwd" + types(d)}; }};
const Family kBackward = {13, "rms_norm.h", [](const std::vector<DType>& d) {
                            return std::vector<std::string>{"rms_norm_bwd" + types(d),
                                                            "column_sums<" + std::string(type_name(accumulator(d[0]))) +
                                                                ", " + type_name(d[1]) + ">"};
                          }};

// Rows of one partial sum of dweight: from M alone, so that the order of the sum never changes.
int64_t partial_rows(int64_t M) { return std::max<int64_t>(32, ceil_div(M, 512)); }

// Rows a sub-group takes one after the other: a start costs as much as half a row of 384 columns on the CPU.
int rows_per_unit(int64_t C) {
  return static_cast<int>(std::max<int64_t>(16, tiles::kElements / std::max<int64_t>(C, 1)));
}

int64_t span(int64_t rows, int64_t stride, int64_t columns) { return rows ? (rows - 1) * stride + columns : 0; }

}  // namespace

void rms_norm_fwd(const RmsNormFwd& p) {
  check(p);
  if (!p.M || !p.C) return;
  Call call("rms_norm_fwd", p.context);
  const std::size_t size = size_of(p.dtype);
  const int rows = rows_per_unit(p.C);
  call.launch(call.bundle(kForward, {p.dtype, p.param_dtype}), 0, ceil_div(p.M, rows),
              call.in(p.x, span(p.M, p.x_stride, p.C), size), call.in(p.weight, p.C, size_of(p.param_dtype)),
              call.out(p.y, p.M * p.C, size), call.out(p.rstd, p.M, size_of(accumulator(p.dtype))), p.M,
              static_cast<int>(p.C), p.x_stride, p.eps, rows);
  call.finish();
}

void rms_norm_bwd(const RmsNormBwd& p) {
  check(p);
  Call call("rms_norm_bwd", p.context);
  const std::size_t size = size_of(p.dtype), param = size_of(p.param_dtype);
  const Bundle& bundle = call.bundle(kBackward, {p.dtype, p.param_dtype});
  const int C = static_cast<int>(p.C);
  const int rows = p.dweight ? static_cast<int>(partial_rows(p.M)) : rows_per_unit(p.C);
  const int64_t units = ceil_div(p.M, rows);
  void* partial = p.dweight ? call.scratch(p.workspace, rms_norm_bwd_workspace(p)) : nullptr;
  if (p.C)
    call.launch(bundle, 0, units, call.in(p.dy, p.M * p.C, size), call.in(p.x, span(p.M, p.x_stride, p.C), size),
                call.in(p.weight, p.C, param), call.in(p.rstd, p.M, size_of(accumulator(p.dtype))),
                call.out(p.dx, p.M * p.C, size), partial, p.M, C, p.x_stride, rows, units);
  if (p.dweight)
    call.launch(bundle, 1, ceil_div(p.C, call.variant().lanes), static_cast<const void*>(partial),
                call.out(p.dweight, p.C, param), units, C);
  call.finish();
}

std::size_t rms_norm_bwd_workspace(const RmsNormBwd& p) {
  return static_cast<std::size_t>(ceil_div(p.M, partial_rows(p.M)) * p.C) * size_of(accumulator(p.dtype));
}

}  // namespace vit
