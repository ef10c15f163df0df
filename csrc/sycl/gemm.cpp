#include "gemm.h"

#include <limits>

namespace vit::device {
namespace {

template <class F>
auto with_tile(DType acc, const F& f) {
  return acc == DType::float64 ? f(tiles::Tile<double>{}) : f(tiles::Tile<float>{});
}

int64_t panel_width(DType acc, const Variant& v) {
  return with_tile(acc, [&](auto tile) { return int64_t{decltype(tile)::vectors} * v.lanes; });
}

int64_t tile_rows(DType acc) {
  return with_tile(acc, [](auto tile) { return int64_t{decltype(tile)::rows}; });
}

// Rows of k that one sub-group packs: enough to be worth its start, few enough to occupy all cores.
constexpr int kDepth = 64;

int as_int(int64_t size) {
  if (size > std::numeric_limits<int>::max())
    throw Error("product: a size is " + std::to_string(size) + "; the sycl backend takes less than 2^31");
  return static_cast<int>(size);
}

int64_t matrices(const Operand& x, const Shape& s) { return x.batch == 0 && s.batch > 0 ? 1 : s.batch; }

}  // namespace

int64_t packed_b_bytes(const Context& context, const Operand& b, const Shape& s) {
  const int64_t width = panel_width(s.acc, variant_of(context));
  return matrices(b, s) * ceil_div(s.N, width) * width * s.K * static_cast<int64_t>(size_of(s.acc));
}

bool in_place(const Operand& a, const Shape& s) { return a.dtype == s.acc && a.col == 1; }

int64_t packed_a_bytes(const Operand& a, const Shape& s) {
  return in_place(a, s) ? 0 : matrices(a, s) * s.M * s.K * static_cast<int64_t>(size_of(s.acc));
}

Packed pack_b(Call& call, const Bundle& bundle, int kernel, const Operand& b, const Shape& s, void* to) {
  const int64_t width = panel_width(s.acc, call.variant()), panels = ceil_div(s.N, width);
  const int64_t count = matrices(b, s), units = count * panels * ceil_div(s.K, kDepth);
  call.launch(bundle, kernel, units, b.data, to, b.batch, b.row, b.col, as_int(s.N), as_int(s.K), kDepth, units);
  return {to, 0, count == 1 ? 0 : panels * width * s.K};
}

Packed pack_a(Call& call, const Bundle& bundle, int kernel, const Operand& a, const Shape& s, void* to) {
  if (in_place(a, s)) return {a.data, a.row, a.batch};
  const int64_t count = matrices(a, s), blocks = ceil_div(s.M, call.variant().lanes);
  const int64_t units = count * blocks * ceil_div(s.K, kDepth);
  call.launch(bundle, kernel, units, a.data, to, a.batch, a.row, a.col, as_int(s.M), as_int(s.K), kDepth, units);
  return {to, s.K, count == 1 ? 0 : s.M * s.K};
}

int64_t product_units(const Call& call, const Shape& s) {
  const int64_t sub_groups = call.variant().sub_groups;
  const int64_t blocks = ceil_div(s.M, tile_rows(s.acc) * tiles::kTilesPerGroup);
  return s.batch * ceil_div(s.N, panel_width(s.acc, call.variant())) * ceil_div(blocks, sub_groups) * sub_groups;
}

void run_product(Call& call, const Bundle& bundle, int kernel, const Packed& a, const Packed& b, void* c,
                 const Shape& s) {
  const int64_t units = product_units(call, s);
  call.launch(bundle, kernel, units, a.data, b.data, c, as_int(s.M), as_int(s.N), as_int(s.K), a.row, a.batch, b.batch,
              units);
}

int64_t extent(int64_t n0, int64_t s0, int64_t n1, int64_t s1, int64_t n2, int64_t s2, int64_t n3, int64_t s3) {
  if (!n0 || !n1 || !n2 || !n3) return 0;
  return (n0 - 1) * s0 + (n1 - 1) * s1 + (n2 - 1) * s2 + (n3 - 1) * s3 + 1;
}

std::string pack_b_name(DType from, DType acc, bool mn_major) {
  return std::string("pack_b<") + type_name(from) + ", " + type_name(acc) + (mn_major ? ", true>" : ", false>");
}

std::string pack_a_name(DType from, DType acc, bool mn_major) {
  return std::string("pack_a<") + type_name(from) + ", " + type_name(acc) + (mn_major ? ", true>" : ", false>");
}

std::string product_name(DType to, DType acc) {
  return std::string("product<") + type_name(to) + ", " + type_name(acc) + ">";
}

}  // namespace vit::device
