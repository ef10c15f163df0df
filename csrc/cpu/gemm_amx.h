// The tile of gemm_tile.h in the matrix registers of AMX: up to 32 rows x 2 vectors of C in four of the eight
// registers, two for rows of A, two for vectors of B. One instruction multiplies 16 rows of 16 words of A by 16 steps
// of a vector of B, 8,192 products of bfloat16 or 16,384 of bytes, in 16 cycles: 16 times as many a cycle as one vector
// instruction has.
//
// An element of C is one chain over k in groups of 16 steps (within a group the products with even and odd k are added
// apart), which goes on where `add` is given: the bits depend neither on blocks of steps nor on the height of a tile.
//
// Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, TDPBF16PS and TDPBUSD.
#pragma once

#include "cpu/gemm_step.h"

#if defined(__AMX_TILE__)

namespace vit::VIT_ISA {

inline constexpr int64_t kMatrixRows = 16;   // of one register
inline constexpr int64_t kMatrixSteps = 16;  // words of a row of A
inline constexpr int64_t kMatrixBytes = kMatrixRows * kVectorBytes;

// The shape of the registers while products run on a thread: all eight of full size. Loading it takes 250 to 450 cycles
// (Emerald Rapids), so that a product loads it once and tiles of fewer rows go through memory.
template <class T>
struct TileRegisters<T, true> {
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {kVectorBytes, kVectorBytes, kVectorBytes, kVectorBytes,
                                kVectorBytes, kVectorBytes, kVectorBytes, kVectorBytes};
      uint8_t rows[16] = {kMatrixRows, kMatrixRows, kMatrixRows, kMatrixRows,
                          kMatrixRows, kMatrixRows, kMatrixRows, kMatrixRows};
    } shape;
    asm volatile("" ::"m"(shape) : "memory");  // the intrinsic does not say that it reads memory
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Registers are named by numerals in the text of an instruction: 0 to 3 are C[row half][vector], 4 and 5 halves of A, 6
// and 7 vectors of B.
#define VIT_DOT(c, a, b)                                                                         \
  do {                                                                                           \
    if constexpr (same<Acc<T>, float>) /* or words of unsigned bytes by words of signed bytes */ \
      _tile_dpbf16ps(c, a, b);                                                                   \
    else                                                                                         \
      _tile_dpbusd(c, a, b);                                                                     \
  } while (false)

template <class T, bool kTall, bool kWide>
VIT_INLINE void multiply_registers() {
  VIT_DOT(0, 4, 6);
  if constexpr (kWide) VIT_DOT(1, 4, 7);
  if constexpr (kTall) VIT_DOT(2, 5, 6);
  if constexpr (kTall && kWide) VIT_DOT(3, 5, 7);
}
#undef VIT_DOT

// Rows of C from memory, `stride` bytes apart; `second` is the first row of the lower half.
template <bool kTall, bool kWide>
VIT_INLINE void load_sums(const char* first, const char* second, int64_t stride) {
  asm volatile("" ::: "memory");
  _tile_loadd(0, first, stride);
  if constexpr (kWide) _tile_loadd(1, first + kVectorBytes, stride);
  if constexpr (kTall) _tile_loadd(2, second, stride);
  if constexpr (kTall && kWide) _tile_loadd(3, second + kVectorBytes, stride);
}

template <bool kTall, bool kWide>
VIT_INLINE void store_sums(char* first, char* second, int64_t stride) {
  _tile_stored(0, first, stride);
  if constexpr (kWide) _tile_stored(1, first + kVectorBytes, stride);
  if constexpr (kTall) _tile_stored(2, second, stride);
  if constexpr (kTall && kWide) _tile_stored(3, second + kVectorBytes, stride);
}

// 16 rows of A in memory of the tile's own: `rows` of them and `steps` <= 16 words of each, zeros beyond.
template <bool kColumns>
VIT_INLINE void copy_rows(const char* a, int64_t stride, int64_t rows, int64_t steps, char* out) {
  u32v block[kMatrixRows];
  if constexpr (kColumns) {
    for (int64_t s = 0; s < kMatrixSteps; ++s) {
      const uint32_t* from = reinterpret_cast<const uint32_t*>(a + s * stride);
      block[s] = s >= steps ? u32v{} : rows >= kMatrixRows ? load_raw<u32v>(from) : load_raw<u32v>(from, rows);
    }
    transpose(block);
  } else {
    for (int64_t r = 0; r < kMatrixRows; ++r) {
      const uint32_t* from = reinterpret_cast<const uint32_t*>(a + r * stride);
      block[r] = r >= rows ? u32v{} : steps >= kMatrixSteps ? load_raw<u32v>(from) : load_raw<u32v>(from, steps);
    }
  }
  memcpy(out, block, sizeof block);
}

// What `tile` does, for more than 16 rows (kTall) or up to 16. The halves of a tall tile of fewer than 32 rows overlap:
// both hold the same sums there.
template <class T, bool kColumns, bool kTall, bool kWide>
__attribute__((noinline)) void matrix_tile(int64_t rows, const char* a, int64_t stride, const char* b, int64_t steps,
                                           const Prefetch& ahead, bool add, Acc<T>* out, int64_t out_stride) {
  constexpr int64_t line = (kWide ? 2 : 1) * kVectorBytes;
  alignas(64) char copies[2 * kMatrixBytes], last[kMatrixSteps * line], sums[kMatrixRows * line];
  const bool copied = kColumns || rows < kMatrixRows;  // where A cannot be read in place
  const int64_t second = kTall ? rows - kMatrixRows : 0, unit = kColumns ? 4 : stride;
  char* c = reinterpret_cast<char*>(out);
  int64_t c_stride = out_stride * static_cast<int64_t>(sizeof(Acc<T>));
  if (!kTall && rows < kMatrixRows) {  // rows of C that do not exist are kept apart
    for (int64_t r = 0; add && r < rows; ++r) memcpy(sums + r * line, c + r * c_stride, line);
    c = sums, c_stride = line;
  }
  if (add) {
    load_sums<kTall, kWide>(c, c + second * c_stride, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (kWide) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kWide) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s += kMatrixSteps) {
    const int64_t count = min(kMatrixSteps, steps - s);
    for (int64_t i = 0; !kColumns && i < count; ++i) __builtin_prefetch(ahead.first + (s + i) * ahead.stride, 0, 2);
    const char *upper = a + s * (kColumns ? stride : 4), *lower = upper + second * unit;
    const char* panel = b + s * line;
    int64_t a_stride = stride;
    if (copied || count < kMatrixSteps) {
      copy_rows<kColumns>(upper, stride, rows, count, copies);
      if constexpr (kTall) copy_rows<kColumns>(lower, stride, kMatrixRows, count, copies + kMatrixBytes);
      upper = copies, lower = copies + kMatrixBytes, a_stride = kVectorBytes;
    }
    if (count < kMatrixSteps) {  // what a panel holds beyond its last step may be anything
      memcpy(last, panel, static_cast<size_t>(count * line));
      memset(last + count * line, 0, static_cast<size_t>((kMatrixSteps - count) * line));
      panel = last;
    }
    asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
    _tile_loadd(6, panel, line);
    if constexpr (kWide) _tile_loadd(7, panel + kVectorBytes, line);
    _tile_loadd(4, upper, a_stride);
    if constexpr (kTall) _tile_loadd(5, lower, a_stride);
    multiply_registers<T, kTall, kWide>();
  }
  store_sums<kTall, kWide>(c, c + second * c_stride, c_stride);
  if (c == sums)
    for (int64_t r = 0; r < rows; ++r) memcpy(reinterpret_cast<char*>(out + r * out_stride), sums + r * line, line);
}

// The matrix_tile of `rows` and `vectors`, called as `tile` is.
template <class T, bool kColumns>
struct MatrixTile {
  int64_t rows, vectors;

  VIT_INLINE void operator()(const char* a, int64_t stride, const char* b, int64_t steps, const Prefetch& ahead,
                             bool add, Acc<T>* out, int64_t out_stride) const {
    const bool tall = rows > kMatrixRows, wide = vectors > 1;
    const auto run = tall   ? wide ? matrix_tile<T, kColumns, true, true> : matrix_tile<T, kColumns, true, false>
                     : wide ? matrix_tile<T, kColumns, false, true>
                            : matrix_tile<T, kColumns, false, false>;
    run(rows, a, stride, b, steps, ahead, add, out, out_stride);
  }
};

}  // namespace vit::VIT_ISA

#endif
