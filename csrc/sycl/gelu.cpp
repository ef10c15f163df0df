// gelu on the device: sizes to launches (kernels: kernels/gelu.h).
#include "check.h"
#include "runtime.h"

namespace vit {
namespace {

using namespace device;

const Family kForward = {3, "gelu.h", [](const std::vector<DType>& d) {
                           return std::vector<std::string>{"gelu_fwd<" + std::string(type_name(d[0])) + ">"};
                         }};
const Family kBackward = {4, "gelu.h", [](const std::vector<DType>& d) {
                            return std::vector<std::string>{"gelu_bwd<" + std::string(type_name(d[0])) + ">"};
                          }};

}  // namespace

void gelu_fwd(const GeluFwd& p) {
  check(p);
  if (!p.n) return;
  Call call("gelu_fwd", p.context);
  const std::size_t size = size_of(p.dtype);
  call.launch(call.bundle(kForward, {p.dtype}), 0, ceil_div(p.n, tiles::kElements), call.in(p.x, p.n, size),
              call.out(p.y, p.n, size), p.n, p.activation);
  call.finish();
}

void gelu_bwd(const GeluBwd& p) {
  check(p);
  if (!p.n) return;
  Call call("gelu_bwd", p.context);
  const std::size_t size = size_of(p.dtype);
  call.launch(call.bundle(kBackward, {p.dtype}), 0, ceil_div(p.n, tiles::kElements), call.in(p.dy, p.n, size),
              call.in(p.x, p.n, size), call.out(p.dx, p.n, size), p.n, p.activation);
  call.finish();
}

}  // namespace vit
