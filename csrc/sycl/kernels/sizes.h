// Tile sizes, read by the host (launch sizes, workspace) and by the kernels: the one place that decides them.
//
// A sub-group of `lanes` work-items is one vector register on the CPU device (16 floats) and one hardware thread on a
// GPU. Products: a sub-group computes rows x (vectors * lanes) results in registers: 8 x 3 vectors are 24 of the 32
// registers of AVX-512, and the addresses of 8 rows fit into the scalar ones. A double fills two registers, so its tile
// is one vector wide.
#pragma once

namespace vit::tiles {

template <class A>
struct Tile {  // A: accumulator, float
  static constexpr int rows = 8;
  static constexpr int vectors = 3;
};
template <>
struct Tile<double> {
  static constexpr int rows = 8;
  static constexpr int vectors = 1;
};

// Row tiles one sub-group computes against the same panel of b, which stays in the L2 cache.
inline constexpr int kTilesPerGroup = 12;

// Rows of one sub-group of at most so many bytes are multiplied with all panels, one after the other, as they stay in
// the L2 cache (Zen 4's 1 MB): 5 to 8 % faster than all rows with one panel.
inline constexpr int kSameRowsBytes = 640 << 10;

// Values of k that the work-group keeps in local memory at a time (variants with local memory only).
inline constexpr int kLocalDepth = 32;

// Rows of a head that one sub-group copies: one each would cost more to start than to copy.
inline constexpr int kCopiedRows = 32;

// Elements one sub-group of an elementwise kernel walks over: one vector each would cost more to start than to compute.
inline constexpr int kElements = 4096;

// Attention: blocks of vectors * lanes queries (keys in the backward). Registers hold scores of `keys` keys at a time,
// in the backward of `pairs` queries with their gradients, and in products with scores `rows` rows of `columns`
// vectors.
template <class A>
struct AttentionTile {
  static constexpr int vectors = 2;
  static constexpr int keys = 12;
  static constexpr int pairs = 6;
  static constexpr int rows = 8;
  static constexpr int columns = 2;
};
template <>
struct AttentionTile<double> {
  static constexpr int vectors = 1;
  static constexpr int keys = 8;
  static constexpr int pairs = 4;
  static constexpr int rows = 6;
  static constexpr int columns = 2;
};

}  // namespace vit::tiles
