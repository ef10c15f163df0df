// What both directions of attention and attention_rows share: blocks, packed operands, the product of one row tile with
// all columns, and which score is larger.
#pragma once

#include "cpu/functions.h"
#include "cpu/gemm.h"

namespace vit::VIT_ISA {

// The range [0, size) in `count` blocks of nearly equal size.
struct Blocks {
  int64_t size, count;

  static Blocks of(int64_t size, int64_t limit) { return {size, ceil_div(size, limit)}; }
  int64_t begin(int64_t i) const { return size * i / count; }
  int64_t end(int64_t i) const { return size * (i + 1) / count; }
  int64_t largest() const { return count ? ceil_div(size, count) : 0; }
};

// Rows of a tile of scores of elements T: queries in the forward, keys in the backward.
template <class T>
inline constexpr int kScoreRows = kTileRows<Operand<T>>;

// The columns of an operand B of elements T in panels of at most kTileVectors vectors: 3, 2 rather than 3, 3, ..., 1.
template <class T>
struct Panels {
  static constexpr int64_t lanes = kWordLanes<Operand<T>>;
  int64_t vectors, count;

  explicit Panels(int64_t columns)
      : vectors(ceil_div(columns, lanes)), count(ceil_div(vectors, kTileVectors<Operand<T>>)) {}
  int64_t begin(int64_t panel) const { return vectors * panel / count; }
  int64_t width() const { return vectors * lanes; }
};

template <class T>
int64_t packed_bytes(int64_t K, int64_t N) {
  return steps_of<Operand<T>>(K) * Panels<T>(N).vectors * kVectorBytes;
}

template <class T>
void pack(const Matrix<T>& b, int64_t K, int64_t N, char* packed) {
  const Panels<T> panels(N);
  const int64_t steps = steps_of<Operand<T>>(K);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t v = panels.begin(panel);
    pack_panel<Operand<T>>(b, v * panels.lanes, panels.begin(panel + 1) - v, 0, steps, K, N,
                           packed + v * steps * kVectorBytes);
  }
}

// Rows that will be wanted soon, brought into L2 by the tiles of the present products: one line per step.
class PrefetchQueue {
 public:
  template <class T>
  void add(const T* rows, int64_t stride, int64_t count, int64_t D) {
    constexpr int64_t size = sizeof(T);
    if (count > 0) list_[count_++] = {reinterpret_cast<const char*>(rows), stride * size, count, D * size};
  }

  // A line of each of the next `steps` rows; where there are none, lines of the panel that is being read.
  VIT_INLINE Prefetch next(int64_t steps, const char* panel) {
    if (at_ == count_) return {panel, 64};
    const Rows& rows = list_[at_];
    const Prefetch ahead{rows.data + row_ * rows.stride + line_, rows.stride};
    row_ += steps;
    if (row_ < rows.count) return ahead;
    row_ = 0, line_ += 64;
    if (line_ >= rows.bytes) line_ = 0, ++at_;
    return ahead;
  }

 private:
  struct Rows {
    const char* data;
    int64_t stride, count, bytes;  // stride and length of a row in bytes
  };
  Rows list_[4];
  int64_t count_ = 0, at_ = 0, row_ = 0, line_ = 0;
};

// Rows of a product, `stride` elements apart.
template <class A>
struct RowTile {
  A* data;
  int64_t stride, rows;
};

// out = A B for the rows of one tile, or with `add` out += A B. a and stride as `tile` takes them.
template <class T, bool kColumns = false>
VIT_INLINE void multiply(const char* a, int64_t stride, const char* b, int64_t steps, const Panels<T>& panels, bool add,
                         const RowTile<Acc<T>>& out, PrefetchQueue& upcoming) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t v0 = panels.begin(panel), v1 = panels.begin(panel + 1);
    const char* panel_b = b + v0 * steps * kVectorBytes;
    const Prefetch ahead = kColumns ? Prefetch{} : upcoming.next(steps, panel_b);  // columns are prefetched by the tile
    tile_for<Operand<T>, kColumns>(out.rows, v1 - v0)(a, stride, panel_b, steps, ahead, add,
                                                      out.data + v0 * panels.lanes, out.stride);
  }
}

// The larger of two scores, or the smaller one where scale is negative.
template <bool kNegative>
struct Larger {
  template <class V>
  VIT_INLINE V operator()(V a, V b) const {
    if constexpr (sizeof(V) == kVectorBytes)
      return kNegative ? vmin(a, b) : vmax(a, b);
    else
      return (kNegative ? a < b : a > b) ? a : b;
  }
};

// What the largest of no scores is.
template <class A, bool kNegative>
inline constexpr A kLeast = kNegative ? A(INFINITY) : -A(INFINITY);

// scale times row r, D elements, to out.
template <class T>
VIT_INLINE void store_row(const RowTile<Acc<T>>& tile, int64_t r, Acc<T> scale, int64_t D, T* out) {
  using A = Acc<T>;
  const A* row = tile.data + r * tile.stride;
  for (int64_t d = 0; d < D; d += kLanes<A>) store<A>(out + d, scale * load<A>(row + d), D - d);
}

}  // namespace vit::VIT_ISA
