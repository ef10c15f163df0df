// rotary on the device: sizes to launches (kernels: kernels/rotary.h).
#include <algorithm>

#include "check.h"
#include "gemm.h"

namespace vit {
namespace {

using namespace device;

std::string turn(const std::vector<DType>& d, const char* options) {
  return std::string("rotary_turn<") + type_name(d[0]) + ", " + type_name(d[1]) + ", " + options + ">";
}

// By pairing: kernels 0 and 1.
const Family kForward = {16, "rotary.h", [](const std::vector<DType>& d) {
                           return std::vector<std::string>{turn(d, "false, false"), turn(d, "true, false")};
                         }};
const Family kBackward = {17, "rotary.h", [](const std::vector<DType>& d) {
                            return std::vector<std::string>{
                                turn(d, "false, true"), turn(d, "true, true"),
                                std::string("rotary_table<") + type_name(d[0]) + ", " + type_name(d[1]) + ">"};
                          }};
constexpr int kTable = 2;

template <class P, class Data>
int64_t span(const P& p, int64_t n, const HeadsOf<Data>& x, int64_t columns) {
  return extent(p.B, x.batch, n, x.token, p.H, x.head, columns, 1);
}

template <class P>
Heads given(Call& call, const P& p, const Heads& x) {
  return {call.in(x.data, span(p, p.N, x, p.D), size_of(p.dtype)), x.batch, x.token, x.head};
}

// Every token of `from`, which the device can read, turned into `to`.
template <class P>
void turn_all(Call& call, const Bundle& bundle, const P& p, const Heads& from, const MutableHeads& to) {
  const std::size_t size = size_of(p.dtype);
  const int64_t positions = p.N - p.prefix, elements = p.B * p.N * p.H * p.D;
  const void* table =
      positions ? call.in(p.table.data, span(p, positions, p.table, 2 * p.D), size_of(p.param_dtype)) : nullptr;
  const int64_t written = span(p, p.N, to, p.D);
  void* y = written == elements ? call.out(to.data, written, size) : call.inout(to.data, written, size);
  const int per_unit = static_cast<int>(std::max<int64_t>(1, tiles::kElements / std::max<int64_t>(p.H * p.D, 1)));
  call.launch(bundle, static_cast<int>(p.pairing), ceil_div(p.B * p.N, per_unit), from.data, table, y,
              static_cast<int>(p.N), static_cast<int>(p.H), static_cast<int>(p.D), static_cast<int>(p.prefix),
              from.batch, from.token, from.head, p.table.batch, p.table.token, p.table.head, to.batch, to.token,
              to.head, p.B * p.N, per_unit);
}

}  // namespace

void rotary_fwd(const RotaryFwd& p) {
  check(p);
  if (!p.B || !p.N || !p.H || !p.D) return;
  Call call("rotary_fwd", p.context);
  turn_all(call, call.bundle(kForward, {p.dtype, p.param_dtype}), p, given(call, p, p.x), p.y);
  call.finish();
}

void rotary_bwd(const RotaryBwd& p) {
  check(p);
  Call call("rotary_bwd", p.context);
  const Bundle& bundle = call.bundle(kBackward, {p.dtype, p.param_dtype});
  const bool work = p.B && p.N && p.H && p.D;
  const Heads dy = work ? given(call, p, p.dy) : p.dy;
  if (work && p.dx.data) turn_all(call, bundle, p, dy, p.dx);
  const int64_t positions = p.N - p.prefix, rows = p.table_B * p.table_H * positions;
  if (p.dtable && rows && p.D) {
    const Heads x = work ? given(call, p, p.x) : p.x;
    const int samples = static_cast<int>(p.table_B == 1 ? p.B : 1), heads = static_cast<int>(p.table_H == 1 ? p.H : 1);
    call.launch(bundle, kTable, rows, dy.data, x.data, call.out(p.dtable, rows * 2 * p.D, size_of(p.param_dtype)),
                static_cast<int>(positions), static_cast<int>(p.D), static_cast<int>(p.prefix),
                static_cast<int>(p.table_H), samples, heads, static_cast<int>(p.pairing == Pairing::half), dy.batch,
                dy.token, dy.head, x.batch, x.token, x.head, rows);
  }
  call.finish();
}

}  // namespace vit
