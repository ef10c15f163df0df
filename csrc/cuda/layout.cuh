// Where elements live: tensor-core fragments, shared-memory tiles, wgmma descriptors. Plain constexpr functions of
// integers, so that the tests check them on a CPU by brute force.
//
// Fragments of mma.m16n8k16 in a warp, lane l, g = l / 4, t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[16, 16]  register i holds rows g + 8 (i % 2), columns 2 t + {0, 1} + 8 (i / 2)
//   b[16, 8]   register i holds rows (k) 2 t + {0, 1} + 8 i, column (n) g
//   c[16, 8]   element i is row g + 8 (i / 2), column 2 t + i % 2
// Two neighbouring c tiles (n and n + 8), packed to 16 bits, are the a fragment of a 16 x 16 product: P of attention
// goes into the second product without leaving its registers.
//
// Fragments of mma.m16n8k8 in TF32 are the same words of 32 bits, one element each where the 16-bit types have two:
//   a[16, 8]   register i holds row g + 8 (i % 2), column t + 4 (i / 2)
//   b[8, 8]    register i holds row (k) t + 4 i, column (n) g
// and c as above; those of mma.m16n8k32 in bytes, four elements to a word. A c tile is an a fragment, elements 0, 2, 1,
// 3, of a product whose k are numbered 0, 2, 4, 6, 1, 3, 5, 7: any order of k will do as long as b has the same.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VIT_HOST_DEVICE __host__ __device__
#else
#define VIT_HOST_DEVICE
#endif

namespace vit::cuda {

VIT_HOST_DEVICE constexpr int fragment_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }     // of c
VIT_HOST_DEVICE constexpr int fragment_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }  // of c

// The row (of 8-element groups) and the group that lane l hands to ldmatrix.x4, relative to the fragment's corner.
struct MatrixAddress {
  int row, group;
};

// a fragment of 16 x 16 from rows of k (k adjacent), plain load; or from rows k of m (m adjacent), transposed load.
VIT_HOST_DEVICE constexpr MatrixAddress a_address(int lane) { return {lane % 16, lane / 16}; }
VIT_HOST_DEVICE constexpr MatrixAddress a_address_transposed(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

// Two b fragments of 16 x 8 side by side (registers 0, 1 and 2, 3): from rows n of k, or rows k of n, transposed load.
VIT_HOST_DEVICE constexpr MatrixAddress b_address(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }
VIT_HOST_DEVICE constexpr MatrixAddress b_address_transposed(int lane) { return {lane % 16, lane / 16}; }

// Shared tiles of 16-byte groups. ldmatrix reads 8 rows at one group and is free of bank conflicts when the 8 land in
// different 16-byte columns of the 128-byte bank line. Returned: the group's index in the tile.
// Rows of 4 groups (32 elements of k): two rows share a bank line, so row / 2 is folded into the group.
VIT_HOST_DEVICE constexpr int swizzle_4(int row, int group) { return row * 4 + (group ^ (row / 2 % 4)); }

// Rows of 8 or more groups (a multiple of 8): row % 8 is folded in. With 8 groups this is the 128-byte swizzle of the
// tensor memory accelerator and of wgmma.
template <int groups>
VIT_HOST_DEVICE constexpr int swizzle_8(int row, int group) {
  static_assert(groups % 8 == 0);
  return row * groups + (group ^ (row % 8));
}

// Rows (k) of groups of four 32-bit elements (m or n), a multiple of 8 groups, read one element at a time: by k = t and
// m = g of a TF32 fragment. Those are two groups in each of four rows, and fall on 32 different banks.
template <int groups>
VIT_HOST_DEVICE constexpr int swizzle_words(int row, int group) {
  static_assert(groups % 8 == 0);
  return row * groups + (group ^ (2 * (row % 4)));
}

// Rows of any even number of groups: one group of padding makes the pitch odd, so 8 rows are 8 different columns.
template <int groups>
VIT_HOST_DEVICE constexpr int padded(int row, int group) {
  static_assert(groups % 2 == 0);
  return row * (groups + 1) + group;
}

// A wgmma operand in shared memory with the 128-byte swizzle, 1024-byte aligned tiles (PTX ISA, "Matrix-Descriptor").
// Rows of k: 64 elements (128 bytes) per row, groups of 8 rows 1024 bytes apart; 16 k further is 32 bytes further.
// Columns (rows k of m or n): blocks of 64 m by 64 k, 8192 bytes each, groups of 8 k 1024 bytes apart; 16 k further is
// 2048 bytes further. Units of the fields are 16 bytes; bit 62 selects the swizzle.
VIT_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}

// The descriptor of 16 k starting at `k` of the tile at `address`: rows `row`.. (a multiple of 64 for columns, of 8
// else).
template <bool kMnMajor>
VIT_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address, int row, int k) {
  if (kMnMajor) return wgmma_descriptor(address + row / 64 * 8192 + k * 128, 8192, 1024);
  return wgmma_descriptor(address + row * 128 + k * 2, 16, 1024);
}

// A tile of `rows` rows (a multiple of 8) as columns of 16-byte groups: the group of 8 elements at `group` of every
// row, one below the other. 8 rows of a group are 128 aligned bytes: a core matrix of wgmma without swizzle, whichever
// of its two sides is k, at any head dimension. (The PTX ISA asks for 16 bytes of alignment alone; every kernel we know
// of keeps 128, and so does this one.)
VIT_HOST_DEVICE constexpr int by_group(int rows, int row, int group) { return group * rows + row; }

// The row and the group of copy i of such a tile: 8 neighbours fill a core matrix, which is all 32 banks once, and 32
// of them read whole sectors of 8 rows.
VIT_HOST_DEVICE constexpr MatrixAddress by_group_copy(int i, int groups) {
  return {i / (8 * groups) * 8 + i % 8, i / 8 % groups};
}

VIT_HOST_DEVICE constexpr uint64_t plain_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return wgmma_descriptor(address, leading_bytes, stride_bytes) & ~(uint64_t{3} << 62);
}

// The descriptors of such a tile: 16 elements (k) from group 2 `step` on of the rows (n) from `row` on; and 16 rows (k)
// from `row` on of all elements (n). The leading distance is along k, the other along n, for both: CUTLASS,
// cute/atom/mma_traits_sm90_gmma.hpp, LayoutType::INTERLEAVE of Major::K and Major::MN.
VIT_HOST_DEVICE constexpr uint64_t rows_descriptor(uint32_t tile, int rows, int row, int step) {
  return plain_descriptor(tile + 16 * by_group(rows, row, 2 * step), 16 * rows, 128);
}
VIT_HOST_DEVICE constexpr uint64_t columns_descriptor(uint32_t tile, int rows, int row) {
  return plain_descriptor(tile + 16 * by_group(rows, row, 0), 128, 16 * rows);
}

// The descriptor of what begins so many groups of 16 bytes further. The address is the lowest field, and no carry
// leaves it.
VIT_HOST_DEVICE constexpr uint64_t moved(uint64_t descriptor, int groups) {
  return (descriptor & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(groups));
}

// Tiles of a [rows, columns] grid of tiles, numbered so that neighbours in time share operands in the L2 cache: bands
// of `band` rows, column after column inside a band.
template <class I>
struct TileIndex {
  I row, column;
};

template <class I>
VIT_HOST_DEVICE constexpr TileIndex<I> tile_at(I index, I rows, I columns, int band) {
  const I first = index / (band * columns) * band;
  const I height = rows - first < band ? rows - first : band;
  const I rest = index % (band * columns);
  return {first + rest % height, rest / height};
}

}  // namespace vit::cuda
