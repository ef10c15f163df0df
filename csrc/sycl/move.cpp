// move on the device: sizes to launches (kernels: kernels/move.h).
#include <algorithm>

#include "check.h"
#include "runtime.h"

namespace vit {
namespace {

using namespace device;

const Family kMove = {11, "move.h", [](const std::vector<DType>& d) {
                        return std::vector<std::string>{"move<" + std::string(type_name(d[0])) + ">"};
                      }};

// About what a sub-group of an elementwise kernel takes.
int rows_per_unit(int64_t columns) {
  return static_cast<int>(std::max<int64_t>(1, tiles::kElements / std::max<int64_t>(columns, 1)));
}

// The elements from the first to the last of a view of these sizes, whose dimension 1 has `middle`.
int64_t span(const View& view, const int64_t (&n)[6], int64_t middle) {
  int64_t last = 1;
  for (int i = 0; i < 6; ++i) last += ((i == 1 ? middle : n[i]) - 1) * view.strides[i];
  return last;
}

}  // namespace

void move(const Move& m) {
  check(m);
  const auto& n = m.sizes;
  const int64_t columns = n[5], rows = n[0] * n[1] * n[2] * n[3] * n[4];
  if (!rows || !columns) return;
  for (const int64_t size : n)
    if (size > 0x7fffffff) throw Error("move: a size is " + std::to_string(size) + ", 2^31 or more");
  const std::size_t size = size_of(m.dtype);
  Call call("move", m.context);
  const bool some = n[1] > m.leads && m.terms > 0;
  const void* a = some ? call.in(m.a.data, span(m.a, n, n[1] - m.leads) + (m.terms - 1) * m.term, size) : nullptr;
  const void* lead = m.leads ? call.in(m.lead.data, span(m.lead, n, m.leads), size) : nullptr;
  const void* b = call.in(m.b.data, span(m.b, n, n[1]), size);
  void* out = call.out(m.out, rows * columns, size);
  const int per_unit = rows_per_unit(columns);
  const auto as_int = [](int64_t x) { return static_cast<int>(x); };
  const auto &sa = m.a.strides, &sl = m.lead.strides, &sb = m.b.strides;
  call.launch(call.bundle(kMove, {m.dtype}), 0, ceil_div(rows, per_unit), a, lead, b, out, as_int(n[1]), as_int(n[2]),
              as_int(n[3]), as_int(n[4]), as_int(columns), as_int(m.leads), as_int(m.terms), m.term, m.divisor, sa[0],
              sa[1], sa[2], sa[3], sa[4], sa[5], sl[0], sl[1], sl[2], sl[3], sl[4], sl[5], sb[0], sb[1], sb[2], sb[3],
              sb[4], sb[5], rows, per_unit);
  call.finish();
}

}  // namespace vit
