// Products of matrices as launches: which layout each operand is brought into, and how much workspace that takes.
#pragma once

#include "runtime.h"

namespace vit::device {

// Operands [batch, rows, columns] in device-readable memory; strides in elements.
struct Operand {
  const void* data;
  int64_t batch, row, col;
  DType dtype;
};

// c [batch, M, N] = a [batch, M, K] b [batch, K, N], summed in `acc`.
struct Shape {
  int64_t batch, M, N, K;
  DType acc;
};

// How the left operand is read: as it is, as rows in the accumulator type, or as packed panels.
enum class LeftLayout { kept, widened, panels };
LeftLayout left_layout(const Operand& a, DType acc);

// What products read in the end; `batch` is the distance between the matrices of a batch.
struct Prepared {
  const void* data;
  int64_t row, batch;
};

int64_t packed_right_bytes(const Context&, const Operand& b, const Shape&);
int64_t prepared_left_bytes(LeftLayout, const Operand& a, const Shape&);

// `kernel` is the index of pack_right in the bundle.
Prepared pack_right(Call&, const Bundle&, int kernel, const Operand& b, const Shape&, void* to);
// `pack` and `widen` are those of pack_left and widen_rows.
Prepared prepare_left(Call&, const Bundle&, int pack, int widen, LeftLayout, const Operand& a, const Shape&, void* to);

// Sub-groups of a product kernel.
int64_t product_units(const Call&, const Shape&);

void run_product(Call&, const Bundle&, int kernel, const Prepared& a, const Prepared& b, void* c, const Shape&);

// Elements from the first to the last one of a matrix or a batch of them.
int64_t extent(int64_t n0, int64_t s0, int64_t n1, int64_t s1, int64_t n2 = 1, int64_t s2 = 0, int64_t n3 = 1,
               int64_t s3 = 0);

// Names of the template instances of pack.h and matmul.h.
std::string pack_right_name(DType from, DType acc, bool rows_adjacent);
std::string pack_left_name(DType from, DType acc);
std::string widen_rows_name(DType from, DType acc);
std::string product_name(DType to, bool panels, DType acc);

}  // namespace vit::device
