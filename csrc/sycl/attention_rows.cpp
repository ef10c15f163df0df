// attention_rows on the device: sizes to launches (kernel: kernels/attention_rows.h).
#include "check.h"
#include "gemm.h"

namespace vit {
namespace {

using namespace device;

const Family kRows = {23, "attention_rows.h", [](const std::vector<DType>& d) {
                        return std::vector<std::string>{std::string("attention_rows<") + type_name(d[0]) + ">"};
                      }};

}  // namespace

void attention_rows(const AttentionRows& p) {
  check(p);
  if (!p.B || !p.R || !p.L || !p.H) return;
  for (const int64_t size : {p.R, p.L, p.H, p.D})
    if (size > 0x7fffffff) throw Error("attention_rows: a size is " + std::to_string(size) + ", 2^31 or more");
  Call call("attention_rows", p.context);
  const std::size_t size = size_of(p.dtype), acc = size_of(accumulator(p.dtype));
  const int64_t rows = p.B * p.R * p.H;
  const int64_t written = extent(p.B, p.rows.batch, p.R, p.rows.token, p.H, p.rows.head, p.L, 1);
  const void* q = call.in(p.q.data, extent(p.B, p.q.batch, p.N, p.q.token, p.H, p.q.head, p.D, 1), size);
  const void* k = call.in(p.k.data, extent(p.B, p.k.batch, p.L, p.k.token, p.H, p.k.head, p.D, 1), size);
  const void* queries = call.in(p.queries, p.R, sizeof(int64_t));
  void* to = written == rows * p.L ? call.out(p.rows.data, written, acc) : call.inout(p.rows.data, written, acc);
  call.launch(call.bundle(kRows, {p.dtype}), 0, rows, q, k, queries, to, static_cast<int>(p.H), static_cast<int>(p.R),
              static_cast<int>(p.L), static_cast<int>(p.D), p.q.batch, p.q.token, p.q.head, p.k.batch, p.k.token,
              p.k.head, p.rows.batch, p.rows.token, p.rows.head, p.scale, rows);
  call.finish();
}

std::size_t attention_rows_workspace(const AttentionRows&) { return 0; }

}  // namespace vit
