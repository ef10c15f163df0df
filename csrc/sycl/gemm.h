// Products of matrices as launches: how operands are packed, and how much workspace that takes.
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

// An operand as product kernels read it; `row` is the distance between rows of an a, `batch` between matrices.
struct Packed {
  const void* data;
  int64_t row, batch;
};

int64_t packed_a_bytes(const Operand& a, const Shape&);
int64_t packed_b_bytes(const Context&, const Operand& b, const Shape&);

// Whether an a is read where it lies.
bool in_place(const Operand& a, const Shape&);

// `kernel` is the index in the bundle of the pack_a or pack_b that fits the operand's strides.
Packed pack_a(Call&, const Bundle&, int kernel, const Operand& a, const Shape&, void* to);
Packed pack_b(Call&, const Bundle&, int kernel, const Operand& b, const Shape&, void* to);

// Sub-groups of a product kernel.
int64_t product_units(const Call&, const Shape&);

void run_product(Call&, const Bundle&, int kernel, const Packed& a, const Packed& b, void* c, const Shape&);

// Elements from the first to the last one of a matrix or a batch of them.
int64_t extent(int64_t n0, int64_t s0, int64_t n1, int64_t s1, int64_t n2 = 1, int64_t s2 = 0, int64_t n3 = 1,
               int64_t s3 = 0);

// Names of the template instances of pack.h and matmul.h.
std::string pack_b_name(DType from, DType acc, bool mn_major);
std::string pack_a_name(DType from, DType acc, bool mn_major);
std::string product_name(DType to, DType acc);

}  // namespace vit::device
