// adamw on the device: sizes to launches (kernels: kernels/adamw.h).
#include <cmath>

#include "check.h"
#include "runtime.h"

namespace vit {
namespace {

using namespace device;

std::vector<std::string> instance(const char* name, const std::vector<DType>& d) {
  return {std::string(name) + "<" + type_name(d[0]) + ">"};
}

const Family kAdamW = {20, "adamw.h", [](const std::vector<DType>& d) { return instance("adamw", d); }};
const Family kAdamW8bit = {21, "adamw.h", [](const std::vector<DType>& d) { return instance("adamw_8bit", d); }};

// f(numbers...) with those of the kernel's AdamWSettings.
template <class A, class F>
void with_settings(const AdamW& p, const F& f) {
  const auto as = [](double x) { return static_cast<A>(x); };
  f(as(1 - p.lr * p.weight_decay), as(1 - p.beta1), as(p.beta2), as(1 - p.beta2), as(p.lr / p.correction1), as(p.eps),
    as(std::sqrt(p.correction2)), as(p.grad_scale), as(1 - p.ema_decay));
}

template <class A>
void run(const AdamW& p) {
  Call call("adamw", p.context);
  const std::size_t size = size_of(p.dtype);
  with_settings<A>(p, [&](auto... settings) {
    call.launch(call.bundle(kAdamW, {p.dtype}), 0, ceil_div(p.n, tiles::kElements), call.inout(p.param, p.n, size),
                call.in(p.grad, p.n, size), call.inout(p.exp_avg, p.n, sizeof(A)),
                call.inout(p.exp_avg_sq, p.n, sizeof(A)), call.inout(p.ema, p.n, sizeof(A)), p.n, settings...);
  });
  call.finish();
}

void run_8bit(const AdamW& p) {
  Call call("adamw", p.context);
  const std::size_t size = size_of(p.dtype);
  const int64_t blocks = ceil_div(p.n, kAdamWBlock);
  with_settings<float>(p, [&](auto... settings) {
    call.launch(call.bundle(kAdamW8bit, {p.dtype}), 0, ceil_div(p.n, tiles::kElements), call.inout(p.param, p.n, size),
                call.in(p.grad, p.n, size), call.inout(p.exp_avg, p.n, 1), call.inout(p.exp_avg_sq, p.n, 1),
                call.inout(p.exp_avg_scale, blocks, 4), call.inout(p.exp_avg_sq_scale, blocks, 4),
                call.inout(p.ema, p.n, 4), call.in(p.code, 512, 4), p.n, settings...);
  });
  call.finish();
}

}  // namespace

void adamw(const AdamW& p) {
  check(p);
  if (!p.n) return;
  if (p.exp_avg_scale)
    run_8bit(p);
  else if (p.dtype == DType::float64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace vit
