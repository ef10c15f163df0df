// swiglu on the device: sizes to launches (kernels: kernels/swiglu.h).
#include <algorithm>

#include "check.h"
#include "runtime.h"

namespace vit {
namespace {

using namespace device;

std::vector<std::string> instance(const char* name, const std::vector<DType>& d) {
  return {std::string(name) + "<" + type_name(d[0]) + ">"};
}

const Family kForward = {14, "swiglu.h", [](const std::vector<DType>& d) { return instance("swiglu_fwd", d); }};
const Family kBackward = {15, "swiglu.h", [](const std::vector<DType>& d) { return instance("swiglu_bwd", d); }};

int rows_per_unit(int64_t columns) {
  return static_cast<int>(std::max<int64_t>(1, tiles::kElements / std::max<int64_t>(columns, 1)));
}

int64_t span(int64_t rows, int64_t stride, int64_t columns) { return rows ? (rows - 1) * stride + columns : 0; }

// Both gradients: two tensors, or the halves of one packed tensor, which is then one piece of memory.
struct Gradients {
  void *dx, *dgate;

  Gradients(Call& call, const SwigluBwd& p, std::size_t size) {
    const auto address = [](void* q) { return reinterpret_cast<std::uintptr_t>(q); };
    const std::uintptr_t half = static_cast<std::uintptr_t>(p.C) * size;
    if (p.dx_stride == 2 * p.C && p.dgate_stride == 2 * p.C && address(p.dx) == address(p.dgate) + half) {
      dgate = call.out(p.dgate, p.M * 2 * p.C, size);
      dx = static_cast<char*>(dgate) + half;
    } else {
      dx = call.inout(p.dx, span(p.M, p.dx_stride, p.C), size);
      dgate = call.inout(p.dgate, span(p.M, p.dgate_stride, p.C), size);
    }
  }
};

}  // namespace

void swiglu_fwd(const SwigluFwd& p) {
  check(p);
  if (!p.M || !p.C) return;
  Call call("swiglu_fwd", p.context);
  const std::size_t size = size_of(p.dtype);
  const int rows = rows_per_unit(p.C);
  call.launch(call.bundle(kForward, {p.dtype}), 0, ceil_div(p.M, rows), call.in(p.x, span(p.M, p.x_stride, p.C), size),
              call.in(p.gate, span(p.M, p.gate_stride, p.C), size), call.out(p.y, p.M * p.C, size), p.M,
              static_cast<int>(p.C), p.x_stride, p.gate_stride, rows);
  call.finish();
}

void swiglu_bwd(const SwigluBwd& p) {
  check(p);
  if (!p.M || !p.C) return;
  Call call("swiglu_bwd", p.context);
  const std::size_t size = size_of(p.dtype);
  const int rows = rows_per_unit(p.C);
  const Gradients to(call, p, size);
  call.launch(call.bundle(kBackward, {p.dtype}), 0, ceil_div(p.M, rows), call.in(p.dy, p.M * p.C, size),
              call.in(p.x, span(p.M, p.x_stride, p.C), size), call.in(p.gate, span(p.M, p.gate_stride, p.C), size),
              to.dx, to.dgate, p.M, static_cast<int>(p.C), p.x_stride, p.gate_stride, p.dx_stride, p.dgate_stride,
              rows);
  call.finish();
}

}  // namespace vit
