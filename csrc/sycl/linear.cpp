// linear on the device: sizes to launches (kernels: kernels/linear.h).
#include <algorithm>

#include "check.h"
#include "gemm.h"

namespace vit {
namespace {

using namespace device;

std::string instance(const char* name, std::initializer_list<DType> types) {
  std::string text = std::string(name) + "<";
  for (const DType type : types) text += (text.back() == '<' ? "" : ", ") + std::string(type_name(type));
  return text + ">";
}

// dtypes: of activations, parameters, output.
enum ForwardKernel { kPackWeight, kForwardProduct, kPackRows };  // the last for rows that are not read in place
const Family kForward = {6, "linear.h", [](const std::vector<DType>& d) {
                           const DType acc = accumulator(d[0]);
                           std::vector<std::string> names{pack_b_name(d[1], acc, false),
                                                          instance("linear_fwd", {d[0], d[1], d[2], acc})};
                           if (d[0] != acc) names.push_back(pack_a_name(d[0], acc, false));
                           return names;
                         }};

enum BackwardKernel {
  kMakeDz,
  kColumnSums,
  kPackWeightRows,
  kProductDx,
  kTransposeDz,
  kPackX,
  kProductDweight,
  kScaleSums
};
const Family kBackward = {7, "linear.h", [](const std::vector<DType>& d) {
                            const DType acc = accumulator(d[0]);
                            return std::vector<std::string>{instance("linear_dz", {d[0], d[2]}),
                                                            instance("column_sums", {acc, d[1]}),
                                                            pack_b_name(d[1], acc, true),
                                                            product_name(d[0], acc),
                                                            instance("linear_transpose", {acc}),
                                                            pack_b_name(d[0], acc, true),
                                                            product_name(d[1], acc),
                                                            instance("column_sums", {acc, acc})};
                          }};

struct Forward {
  Operand x, weight;
  Shape shape;
  char *packed_weight, *packed_x;
  int64_t bytes;

  Forward(const LinearFwd& p, char* base)
      : x{p.x, 0, p.x_stride, 1, p.dtype},
        weight{p.weight, 0, 1, p.weight_stride, p.param_dtype},
        shape{1, p.M, p.N, p.K, accumulator(p.dtype)} {
    Arena arena{base};
    packed_weight = arena.take(packed_b_bytes(p.context, weight, shape));
    packed_x = arena.take(packed_a_bytes(x, shape));
    bytes = arena.used;
  }
};

// Rows of one partial sum of dbias and dscale: from M alone, so that the order of the sum never changes, and whole
// squares of the transposition.
int64_t partial_rows(int64_t M) { return ceil_div(std::max<int64_t>(32, ceil_div(M, 512)), 32) * 32; }

// Partial sums that one sub-group of linear_transpose makes.
constexpr int kChunks = 4;

struct Backward {
  DType acc;
  int64_t rows, units;
  bool dz_is_dy;
  Operand weight, x;
  Shape dx, dweight;
  char *dz, *partial, *partial_scale, *packed, *transposed;
  int64_t bytes;

  Backward(const LinearBwd& p, char* base)
      : acc(accumulator(p.dtype)),
        rows(partial_rows(p.M)),
        units(ceil_div(p.M, rows)),
        dz_is_dy(p.activation == Activation::none && !p.scale && p.out_dtype == acc),
        weight{p.weight, 0, p.weight_stride, 1, p.param_dtype},
        x{p.x, 0, p.x_stride, 1, p.dtype},
        dx{1, p.M, p.K, p.N, acc},
        dweight{1, p.N, p.K, p.M, acc} {
    const int64_t size = static_cast<int64_t>(size_of(acc));
    Arena arena{base};
    dz = arena.take(dz_is_dy ? 0 : p.M * p.N * size);
    partial = arena.take(units * p.N * size);
    partial_scale = arena.take(units * p.N * size);
    packed = arena.take(std::max(packed_b_bytes(p.context, weight, dx), packed_b_bytes(p.context, x, dweight)));
    transposed = arena.take(p.M * p.N * size);
    bytes = arena.used;
  }
};

}  // namespace

void linear_fwd(const LinearFwd& p) {
  check(p);
  if (!p.M || !p.N) return;
  Call call("linear_fwd", p.context);
  const std::size_t size = size_of(p.dtype), param = size_of(p.param_dtype), result = size_of(p.out_dtype);
  const Bundle& bundle = call.bundle(kForward, {p.dtype, p.param_dtype, p.out_dtype});
  Forward f(p, static_cast<char*>(call.scratch(p.workspace, linear_fwd_workspace(p))));
  f.x.data = call.in(p.x, extent(p.M, p.x_stride, p.K, 1), size);
  f.weight.data = call.in(p.weight, extent(p.N, p.weight_stride, p.K, 1), param);
  const Packed weight = pack_b(call, bundle, kPackWeight, f.weight, f.shape, f.packed_weight);
  const Packed x = pack_a(call, bundle, kPackRows, f.x, f.shape, f.packed_x);
  const int64_t units = product_units(call, f.shape);
  call.launch(bundle, kForwardProduct, units, x.data, weight.data, call.in(p.bias, p.N, param),
              call.in(p.scale, p.N, size_of(accumulator(p.dtype))), call.in(p.residual, p.M * p.N, result),
              call.out(p.y, p.M * p.N, result), call.out(p.preact, p.M * p.N, size), static_cast<int>(p.M),
              static_cast<int>(p.N), static_cast<int>(p.K), x.row, p.activation, units);
  call.finish();
}

void linear_bwd(const LinearBwd& p) {
  check(p);
  Call call("linear_bwd", p.context);
  const std::size_t size = size_of(p.dtype), param = size_of(p.param_dtype), result = size_of(p.out_dtype);
  const Bundle& bundle = call.bundle(kBackward, {p.dtype, p.param_dtype, p.out_dtype});
  Backward b(p, static_cast<char*>(call.scratch(p.workspace, linear_bwd_workspace(p))));
  const void* dy = call.in(p.dy, p.M * p.N, result);
  void* made = b.dz_is_dy ? nullptr : b.dz;
  const void* dz = made ? made : dy;
  const std::size_t acc = size_of(b.acc);
  void *partial = p.dbias ? b.partial : nullptr, *partial_scale = p.dscale ? b.partial_scale : nullptr;
  void* transposed = b.transposed;
  const bool transposes = p.dweight && p.N && p.K && p.M, sums_later = transposes && b.dz_is_dy;
  const int rows = static_cast<int>(b.rows);
  if (p.N && (made || (partial && !sums_later) || partial_scale))
    call.launch(bundle, kMakeDz, b.units, dy, call.in(p.preact, p.M * p.N, size), call.in(p.scale, p.N, acc), made,
                sums_later ? nullptr : partial, partial_scale, static_cast<int>(p.M), static_cast<int>(p.N),
                p.activation, rows, b.units);
  if (p.dx && p.M && p.K) {
    b.weight.data = call.in(p.weight, extent(p.N, p.weight_stride, p.K, 1), param);
    const Packed weight = pack_b(call, bundle, kPackWeightRows, b.weight, b.dx, b.packed);
    run_product(call, bundle, kProductDx, {dz, p.N, 0}, weight, call.out(p.dx, p.M * p.K, size), b.dx);
  }
  if (transposes) {
    const int64_t units = ceil_div(p.N, call.variant().lanes) * ceil_div(p.M, b.rows * kChunks);
    call.launch(bundle, kTransposeDz, units, dz, transposed, sums_later ? partial : nullptr, static_cast<int>(p.M),
                static_cast<int>(p.N), rows, kChunks, units);
  }
  if (p.dscale)
    call.launch(bundle, kScaleSums, ceil_div(p.N, call.variant().lanes), static_cast<const void*>(partial_scale),
                call.out(p.dscale, p.N, acc), b.units, static_cast<int>(p.N));
  if (p.dbias)
    call.launch(bundle, kColumnSums, ceil_div(p.N, call.variant().lanes), static_cast<const void*>(partial),
                call.out(p.dbias, p.N, param), b.units, static_cast<int>(p.N));
  if (p.dweight && p.N && p.K) {
    b.x.data = call.in(p.x, extent(p.M, p.x_stride, p.K, 1), size);
    const Packed x = pack_b(call, bundle, kPackX, b.x, b.dweight, b.packed);
    run_product(call, bundle, kProductDweight, {transposed, p.M, 0}, x, call.out(p.dweight, p.N * p.K, param),
                b.dweight);
  }
  call.finish();
}

std::size_t linear_fwd_workspace(const LinearFwd& p) { return static_cast<std::size_t>(Forward(p, nullptr).bytes); }

std::size_t linear_bwd_workspace(const LinearBwd& p) { return static_cast<std::size_t>(Backward(p, nullptr).bytes); }

}  // namespace vit
