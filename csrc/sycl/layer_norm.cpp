// layer_norm on the device: sizes to launches (kernels: kernels/layer_norm.h).
#include "layer_norm.h"

#include <algorithm>

#include "check.h"

namespace vit::device {
namespace {

std::string types(const std::vector<DType>& d) {
  return std::string("<") + type_name(d[0]) + ", " + type_name(d[1]) + ">";
}

const Family kBackward = {2, "layer_norm.h", [](const std::vector<DType>& d) {
                            return std::vector<std::string>{"layer_norm_bwd" + types(d),
                                                            "column_sums<" + std::string(type_name(accumulator(d[0]))) +
                                                                ", " + type_name(d[1]) + ">"};
                          }};

// Rows of one partial sum of dweight and dbias: from M alone, so that the order of the sum never changes.
int64_t partial_rows(int64_t M) { return std::max<int64_t>(32, ceil_div(M, 512)); }

// Rows a sub-group takes one after the other: on the CPU a start costs as much as half a row.
constexpr int kRows = 16;

int64_t span(int64_t rows, int64_t stride, int64_t columns) { return rows ? (rows - 1) * stride + columns : 0; }

}  // namespace

const Family kLayerNormForward = {1, "layer_norm.h", [](const std::vector<DType>& d) {
                                    return std::vector<std::string>{"layer_norm_fwd" + types(d)};
                                  }};

}  // namespace vit::device

namespace vit {

using namespace device;

void layer_norm_fwd(const LayerNormFwd& p) {
  check(p);
  if (!p.M || !p.C) return;
  Call call("layer_norm_fwd", p.context);
  const std::size_t size = size_of(p.dtype), param = size_of(p.param_dtype), acc = size_of(accumulator(p.dtype));
  const Bundle& bundle = call.bundle(kLayerNormForward, {p.dtype, p.param_dtype});
  call.launch(bundle, 0, ceil_div(p.M, kRows), call.in(p.x, span(p.M, p.x_stride, p.C), size),
              call.in(p.weight, p.C, param), call.in(p.bias, p.C, param), call.out(p.y, p.M * p.C, size),
              call.out(p.mean, p.M, acc), call.out(p.rstd, p.M, acc), p.M, static_cast<int>(p.C), p.x_stride, p.eps,
              kRows);
  call.finish();
}

void layer_norm_bwd(const LayerNormBwd& p) {
  check(p);
  Call call("layer_norm_bwd", p.context);
  const std::size_t size = size_of(p.dtype), param = size_of(p.param_dtype), acc = size_of(accumulator(p.dtype));
  const Bundle& bundle = call.bundle(kBackward, {p.dtype, p.param_dtype});
  const int C = static_cast<int>(p.C);
  const bool sums = p.dweight || p.dbias;
  const int rows = static_cast<int>(sums ? partial_rows(p.M) : kRows);
  const int64_t units = ceil_div(p.M, rows);
  char* partial = sums ? static_cast<char*>(call.scratch(p.workspace, layer_norm_bwd_workspace(p))) : nullptr;
  if (p.C)
    call.launch(bundle, 0, units, call.in(p.dy, p.M * p.C, size), call.in(p.x, span(p.M, p.x_stride, p.C), size),
                call.in(p.weight, p.C, param), call.in(p.mean, p.M, acc), call.in(p.rstd, p.M, acc),
                call.out(p.dx, p.M * p.C, size), static_cast<void*>(partial), p.M, C, p.x_stride, rows, units);
  const int64_t columns = ceil_div(p.C, call.variant().lanes);
  if (p.dweight)
    call.launch(bundle, 1, columns, static_cast<void*>(partial), call.out(p.dweight, p.C, param), units, C);
  if (p.dbias)
    call.launch(bundle, 1, columns, static_cast<void*>(partial + units * p.C * static_cast<int64_t>(acc)),
                call.out(p.dbias, p.C, param), units, C);
  call.finish();
}

std::size_t layer_norm_bwd_workspace(const LayerNormBwd& p) {
  const int64_t units = ceil_div(p.M, partial_rows(p.M));
  return static_cast<std::size_t>(2 * units * p.C) * size_of(accumulator(p.dtype));
}

}  // namespace vit
