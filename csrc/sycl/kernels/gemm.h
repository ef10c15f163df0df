// The product of rows of a with a packed b (pack.h), tile by tile.
//
// A sub-group takes one panel of b and kTilesPerGroup row tiles of a; a tile of R x V
// vectors of results stays in registers while k runs once from 0 to K: every result is one sum in the order of k,
// whatever M, N or the batch. Per k a tile costs V vector loads, R scalar loads (of rows that lie where the caller has
// them, adjacent in k) and R V fused multiply-adds.
#pragma once

#include "common.h"

#if VIT_LOCAL
// The columns of the panel that a work-group is reading, kLocalDepth at a time.
template <class A>
struct Local {
  static constexpr int size = vit::tiles::kLocalDepth * vit::tiles::Tile<A>::vectors * VIT_LANES;
};
sycl::ext::oneapi::experimental::work_group_static<float[Local<float>::size]> local_floats;
sycl::ext::oneapi::experimental::work_group_static<double[Local<double>::size]> local_doubles;
VIT_INLINE float* local_panel(float) { return &local_floats[0]; }
VIT_INLINE double* local_panel(double) { return &local_doubles[0]; }
#endif

template <class A>
VIT_INLINE void multiply_tile(const A* const (&row)[vit::tiles::Tile<A>::rows], const A* panel, int K, int lane,
                              A (&sum)[vit::tiles::Tile<A>::rows][vit::tiles::Tile<A>::vectors]) {
  using Tile = vit::tiles::Tile<A>;
  constexpr int R = Tile::rows, V = Tile::vectors, width = V * VIT_LANES;
  VIT_UNROLL for (int i = 0; i < R; ++i) VIT_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = 0;
#if VIT_LOCAL
  const auto item = sycl::ext::oneapi::this_work_item::get_nd_item<1>();
  A* local = local_panel(A());
  for (int k0 = 0; k0 < K; k0 += vit::tiles::kLocalDepth) {
    const int depth = K - k0 < vit::tiles::kLocalDepth ? K - k0 : vit::tiles::kLocalDepth;
    sycl::group_barrier(item.get_group());
    for (int e = int(item.get_local_id(0)); e < depth * width; e += VIT_LANES * VIT_SUB_GROUPS)
      local[e] = panel[int64(k0) * width + e];
    sycl::group_barrier(item.get_group());
    for (int k = 0; k < depth; ++k) {
      A b[V];
      VIT_UNROLL for (int j = 0; j < V; ++j) b[j] = local[k * width + j * VIT_LANES + lane];
      VIT_UNROLL for (int i = 0; i < R; ++i) {
        const A value = row[i][k0 + k];
        VIT_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = sycl::fma(value, b[j], sum[i][j]);
      }
    }
  }
#else
  for (int k = 0; k < K; ++k) {
    const A* vectors = panel + int64(k) * width;
    A b[V];
    VIT_UNROLL for (int j = 0; j < V; ++j) b[j] = vectors[j * VIT_LANES + lane];
    VIT_UNROLL for (int i = 0; i < R; ++i) {
      const A value = row[i][k];
      VIT_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = sycl::fma(value, b[j], sum[i][j]);
    }
  }
#endif
}

// Sizes of one launch: products [M, K] x [K, N]; rows of a lie a_row elements apart, matrices a_batch and b_batch.
struct Sizes {
  int M, N, K;
  int64 a_row, a_batch, b_batch;
};

// What a product of A ends in: with kExact, whole numbers whose sums of kExact products A holds exactly, an integer.
template <class A, int kExact>
struct ResultOf {
  using type = int;
};
template <class A>
struct ResultOf<A, 0> {
  using type = A;
};

// Calls finish(pair, row, column of the first lane, value) for the results of this sub-group's unit; lanes beyond N
// have been left out.
template <class A, int kExact = 0, class F>
VIT_INLINE void multiply(const A* a, const A* packed, const Sizes& s, int64 units, const F& finish) {
  using Tile = vit::tiles::Tile<A>;
  constexpr int R = Tile::rows, V = Tile::vectors, width = V * VIT_LANES, block = R * vit::tiles::kTilesPerGroup;
  const Place at = place();
#if !VIT_LOCAL
  if (at.unit >= units) return;
#endif
  // The sub-groups of a work-group share a panel. The units that follow each other on a core have the same rows, which
  // then come from its L2 cache, or where these are too long the same panel.
  const int lane = at.lane, panels = (s.N + width - 1) / width;
  const int blocks = ((s.M + block - 1) / block + VIT_SUB_GROUPS - 1) / VIT_SUB_GROUPS;  // of a work-group
  const bool same_rows = int64(s.K) * block * int(sizeof(A)) <= vit::tiles::kSameRowsBytes;
  const int inner = same_rows ? panels : blocks, outer = same_rows ? blocks : panels;
  const int64 group = at.unit / VIT_SUB_GROUPS, pair = group / inner / outer;
  const int in = int(group % inner), out = int(group / inner % outer), panel = same_rows ? in : out;
  const int row_block = (same_rows ? out : in) * VIT_SUB_GROUPS + int(at.unit % VIT_SUB_GROUPS);
  const A* panel_b = packed + pair * s.b_batch + int64(panel) * s.K * width;
  const A* matrix_a = a + pair * s.a_batch;
  for (int tile = 0; tile < vit::tiles::kTilesPerGroup; ++tile) {
    const int first = row_block * block + tile * R;
#if !VIT_LOCAL  // whose barriers are for all sub-groups
    if (first >= s.M) return;
#endif
    const A* row[R];  // those beyond the last one repeat it
    VIT_UNROLL for (int i = 0; i < R; ++i) row[i] = matrix_a + (first + i < s.M ? first + i : s.M - 1) * s.a_row;
    A sum[R][V];
    // Through an array of its own: `sum` is indexed by constants alone and stays in registers.
    typename ResultOf<A, kExact>::type results[R * V];
    if constexpr (kExact == 0) {
      multiply_tile<A>(row, panel_b, s.K, lane, sum);
      VIT_UNROLL for (int i = 0; i < R; ++i) VIT_UNROLL for (int j = 0; j < V; ++j) results[i * V + j] = sum[i][j];
    } else {
      VIT_UNROLL for (int i = 0; i < R * V; ++i) results[i] = 0;
      for (int k = 0; k < s.K; k += kExact) {
        multiply_tile<A>(row, panel_b + int64(k) * width, s.K - k < kExact ? s.K - k : kExact, lane, sum);
        VIT_UNROLL for (int i = 0; i < R; ++i) row[i] += kExact;
        VIT_UNROLL for (int i = 0; i < R; ++i) VIT_UNROLL for (int j = 0; j < V; ++j) results[i * V + j] +=
            int(sum[i][j]);
      }
    }
    // Two loops: were whole and partial vectors two branches, the compiler would let them share their store, which then
    // is a scatter (170 cycles a vector).
    const int left_over = s.N - panel * width, whole = left_over >= width ? V : left_over / VIT_LANES;
    for (int i = 0; i < R && first + i < s.M; ++i)
      for (int j = 0; j < whole; ++j) finish(pair, first + i, panel * width + j * VIT_LANES, lane, results[i * V + j]);
    if (whole < V && whole * VIT_LANES + lane < left_over)
      for (int i = 0; i < R && first + i < s.M; ++i)
        finish(pair, first + i, panel * width + whole * VIT_LANES, lane, results[i * V + whole]);
  }
}
