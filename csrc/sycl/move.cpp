// Copies between the ops of a model (kernels/move.h): no op of the contract, so Python calls it by ctypes.
#include <algorithm>
#include <string>

#include "check.h"
#include "runtime.h"

namespace vit::device {
namespace {

const Family kMove = {11, "move.h", [](const std::vector<DType>& d) {
                        return std::vector<std::string>{"move<" + std::string(type_name(d[0])) + ">"};
                      }};

// About what a sub-group of an elementwise kernel takes.
int rows_per_unit(int64_t columns) {
  return static_cast<int>(std::max<int64_t>(1, tiles::kElements / std::max<int64_t>(columns, 1)));
}

}  // namespace

// The fields of `backends/sycl.py: _Move`, in that order.
struct Move {
  const void *a, *lead, *b;
  void* out;
  int64_t n[5], columns, leads, lead_batch, terms, term, a_strides[5], b_strides[5];
  int64_t dtype;
  void* stream;
};

void move(const Move& m) {
  const auto& n = m.n;
  const int64_t rows = n[0] * n[1] * n[2] * n[3] * n[4], size_a = n[1] - m.leads;
  if (!rows || !m.columns) return;
  Context context;
  context.stream = m.stream;
  const DType dtype = static_cast<DType>(m.dtype);
  const std::size_t size = size_of(dtype);
  Call call("move", context);
  const auto extent = [&](const int64_t (&strides)[5], int64_t middle) {
    int64_t last = m.columns;
    for (int i = 0; i < 5; ++i) last += ((i == 1 ? middle : n[i]) - 1) * strides[i];
    return last;
  };
  const void* a = m.a ? call.in(m.a, extent(m.a_strides, size_a) + (m.terms - 1) * m.term, size) : nullptr;
  const void* lead = m.lead ? call.in(m.lead, (n[0] - 1) * m.lead_batch + m.leads * m.columns, size) : nullptr;
  const void* b = m.b ? call.in(m.b, extent(m.b_strides, n[1]), size) : nullptr;
  void* out = call.out(m.out, rows * m.columns, size);
  const int per_unit = rows_per_unit(m.columns);
  const auto as_int = [](int64_t x) { return static_cast<int>(x); };
  call.launch(call.bundle(kMove, {dtype}), 0, ceil_div(rows, per_unit), a, lead, b, out, as_int(n[1]), as_int(n[2]),
              as_int(n[3]), as_int(n[4]), as_int(m.columns), as_int(m.leads), m.lead_batch, as_int(m.terms), m.term,
              m.a_strides[0], m.a_strides[1], m.a_strides[2], m.a_strides[3], m.a_strides[4], m.b_strides[0],
              m.b_strides[1], m.b_strides[2], m.b_strides[3], m.b_strides[4], rows, per_unit);
  call.finish();
}

}  // namespace vit::device

// Null, or what went wrong (valid until the thread's next call).
extern "C" __attribute__((visibility("default"))) const char* vit_sycl_move(const vit::device::Move* m) {
  thread_local std::string error;
  try {
    vit::device::move(*m);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
