// Brute-force checks of csrc/cuda/layout.cuh, and of driver.cuh: prints what is wrong, "ok" when all is well.
#include "layout.cuh"

#include <cstdio>
#include <set>
#include <vector>

// A runtime that fails so many times, and keeps an error until it is asked for.
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
static constexpr int cudaEnableDefault = 0;
static cudaError_t kept = cudaSuccess;
static int failures_left = 0, asked = 0;
static cudaError_t cudaGetLastError() {
  const cudaError_t error = kept;
  kept = cudaSuccess;
  return error;
}
static cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  ++asked;
  if (failures_left-- > 0) return kept = cudaErrorUnknown;
  const bool known = name[0] == 'c';
  *function = known ? &asked : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

#include "driver.cuh"

using namespace vit::cuda;

static int failures = 0;

static void check(bool ok, const char* what, int a = 0, int b = 0) {
  if (!ok) ++failures, std::printf("%s (%d, %d)\n", what, a, b);
}

// 8 rows that ldmatrix reads at one group must lie in 8 different 16-byte columns of the 32 banks.
template <class F>
static void no_bank_conflicts(const char* what, int rows, int groups, F place) {
  std::set<int> used;
  for (int row = 0; row < rows; ++row)
    for (int group = 0; group < groups; ++group) check(used.insert(place(row, group)).second, what, row, group);
  for (int row = 0; row < rows; row += 8)
    for (int group = 0; group < groups; ++group) {
      std::set<int> columns;
      for (int i = 0; i < 8; ++i) columns.insert(place(row + i, group) % 8);
      check(columns.size() == 8, what, row, group);
    }
}

// Each element of a fragment has exactly one lane and register.
static void fragments_cover() {
  std::set<int> seen;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = fragment_row(lane, i), column = fragment_column(lane, i);
      check(row >= 0 && row < 16 && column >= 0 && column < 8, "fragment outside its tile", lane, i);
      check(seen.insert(row * 8 + column).second, "fragment element twice", lane, i);
    }
}

// The rows that the 32 lanes give to ldmatrix.x4 are all rows of the fragment, each group once.
template <class F>
static void addresses_cover(const char* what, F address) {
  std::set<int> seen;
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixAddress a = address(lane);
    check(a.row >= 0 && a.row < 16 && a.group >= 0 && a.group < 2, what, lane);
    check(seen.insert(a.row * 2 + a.group).second, what, lane);
  }
}

// The 32 lanes that read one word each (TF32, by k = t and m = g) must hit 32 different banks.
template <class F>
static void words_on_all_banks(const char* what, int rows, int columns, F place) {
  std::set<int> used;
  for (int k = 0; k < rows; ++k)
    for (int m = 0; m < columns; ++m) check(used.insert(place(k, m)).second, what, k, m);
  for (int k = 0; k < rows; k += 4)
    for (int m = 0; m < columns; m += 8) {
      std::set<int> banks;
      for (int lane = 0; lane < 32; ++lane) banks.insert(place(k + lane % 4, m + lane / 4) % 32);
      check(banks.size() == 32, what, k, m);
    }
}

static void tiles_cover(int64_t rows, int64_t columns, int64_t band) {
  std::set<int64_t> seen;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const TileIndex<int64_t> t = tile_at(i, rows, columns, static_cast<int>(band));
    check(t.row >= 0 && t.row < rows && t.column >= 0 && t.column < columns, "tile outside the grid");
    check(seen.insert(t.row * columns + t.column).second, "tile twice");
  }
}

// Where the tensor memory accelerator writes element (row, k) of a box, and where wgmma reads it through a descriptor.
static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

static void descriptors_agree() {
  for (int row = 0; row < 128; row += 8)
    for (int k = 0; k < 64; k += 16) {
      const uint64_t d = operand_descriptor<false>(2048, row, k);
      check(d >> 62 == 1, "descriptor without swizzle");
      for (int r = 0; r < 8; ++r)
        for (int i = 0; i < 16; ++i) {
          const uint32_t start = static_cast<uint32_t>(d & 0x3fff) << 4;
          const uint32_t written = 2048 + swizzled((row + r) * 128 + (k + i) * 2);
          check(swizzled(start + r * 128 + i * 2) == written, "rows of k", row + r, k + i);
        }
    }
  for (int row = 0; row < 128; row += 64)
    for (int k = 0; k < 64; k += 16) {
      const uint64_t d = operand_descriptor<true>(4096, row, k);
      const uint32_t start = static_cast<uint32_t>(d & 0x3fff) << 4;
      const uint32_t leading = static_cast<uint32_t>(d >> 16 & 0x3fff) << 4;
      const uint32_t stride = static_cast<uint32_t>(d >> 32 & 0x3fff) << 4;
      for (int r = 0; r < 128 - row; ++r)
        for (int i = 0; i < 16; ++i) {
          const int box = (row + r) / 64;
          const uint32_t written = 4096 + box * 8192 + swizzled((k + i) * 128 + (row + r) % 64 * 2);
          const uint32_t read = start + r / 64 * leading + r % 64 * 2 + i / 8 * stride + i % 8 * 128;
          check(swizzled(read) == written, "columns", row + r, k + i);
        }
    }
}

// A tile by groups, read through its two descriptors (no swizzle: PTX ISA, "Strides"); its copies reach every group
// once, 8 neighbours of them in different columns of the banks, 4 times 8 in whole sectors of device memory.
template <int rows, int groups>
static void tiles_by_group() {
  std::set<int> used;
  for (int row = 0; row < rows; ++row)
    for (int group = 0; group < groups; ++group) {
      check(used.insert(by_group(rows, row, group)).second, "by_group", row, group);
      check(by_group(rows, row, group) < by_group(rows, 0, groups), "by_group beyond its tile", row, group);
    }
  std::set<int> copied;
  for (int first = 0; first < rows * groups; first += 8) {
    std::set<int> columns;
    for (int i = first; i < first + 8; ++i) {
      const auto [row, group] = by_group_copy(i, groups);
      check(copied.insert(by_group(rows, row, group)).second, "copied twice", row, group);
      columns.insert(by_group(rows, row, group) % 8);
      const auto pair = by_group_copy(i ^ 8, groups);
      check(pair.row == row && pair.group == (group ^ 1), "half of a sector", row, group);
    }
    check(columns.size() == 8, "by_group: bank conflict", first);
  }
  check(copied.size() == used.size(), "not all copied");
  const auto place = [](uint64_t d, int along_n, int along_k) {
    const uint32_t start = static_cast<uint32_t>(d & 0x3fff) << 4, leading = static_cast<uint32_t>(d >> 16 & 0x3fff)
                                                                             << 4;
    return start + along_n * (static_cast<uint32_t>(d >> 32 & 0x3fff) << 4) + along_k * leading;
  };
  constexpr uint32_t tile = 1152;  // 128-byte aligned
  const auto written = [](int row, int element) {
    return tile + 16 * static_cast<uint32_t>(by_group(rows, row, element / 8)) + element % 8 * 2;
  };
  for (int row = 0; row < rows; row += 8)
    for (int step = 0; step < groups / 2; ++step) {
      const uint64_t d = rows_descriptor(tile, rows, row, step);
      check(d >> 62 == 0, "descriptor with swizzle");
      check((d & 7) == 0 && (d >> 16 & 7) == 0 && (d >> 32 & 7) == 0, "core matrices across lines", row, step);
      for (int n = 0; n < rows - row; ++n)
        for (int k = 0; k < 16; ++k)
          check(place(d, n / 8, k / 8) + n % 8 * 16 + k % 8 * 2 == written(row + n, 16 * step + k), "rows", row, n);
    }
  for (int row = 0; row + 16 <= rows; row += 16) {
    const uint64_t d = columns_descriptor(tile, rows, row);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8 * groups; ++n)
        check(place(d, n / 8, k / 8) + k % 8 * 16 + n % 8 * 2 == written(row + k, n), "columns", row, n);
  }
}

// A failure is not for ever and leaves no error behind; what was found is not looked for again.
static void driver_functions() {
  static std::atomic<void*> known{nullptr}, unknown{nullptr};
  failures_left = 2;
  for (int call = 0; call < 4; ++call) {
    check((driver_function("cuSomething", 12000, known) == &asked) == (call >= 2), "driver function", call);
    check(kept == cudaSuccess, "an error was left", call);
  }
  check(asked == 3, "looked for again", asked);
  check(!driver_function("unknown", 12000, unknown), "found what is not there");
}

int main() {
  driver_functions();
  no_bank_conflicts("swizzle_4", 128, 4, [](int r, int g) { return swizzle_4(r, g); });
  no_bank_conflicts("swizzle_8<8>", 64, 8, [](int r, int g) { return swizzle_8<8>(r, g); });
  no_bank_conflicts("swizzle_8<16>", 32, 16, [](int r, int g) { return swizzle_8<16>(r, g); });
  no_bank_conflicts("padded<4>", 64, 4, [](int r, int g) { return padded<4>(r, g); });
  no_bank_conflicts("padded<8>", 64, 8, [](int r, int g) { return padded<8>(r, g); });
  no_bank_conflicts("padded<10>", 64, 10, [](int r, int g) { return padded<10>(r, g); });
  no_bank_conflicts("padded<12>", 64, 12, [](int r, int g) { return padded<12>(r, g); });
  no_bank_conflicts("padded<16>", 64, 16, [](int r, int g) { return padded<16>(r, g); });
  no_bank_conflicts("padded<32>", 64, 32, [](int r, int g) { return padded<32>(r, g); });
  words_on_all_banks("swizzle_words<16>", 16, 64, [](int k, int m) { return 4 * swizzle_words<16>(k, m / 4) + m % 4; });
  words_on_all_banks("swizzle_words<32>", 16, 128,
                     [](int k, int m) { return 4 * swizzle_words<32>(k, m / 4) + m % 4; });
  words_on_all_banks("padded<16>, every second row", 4, 64,
                     [](int k, int m) { return 4 * padded<16>(2 * k, m / 4) + m % 4; });
  words_on_all_banks("padded<32>, every second row", 4, 128,
                     [](int k, int m) { return 4 * padded<32>(2 * k, m / 4) + m % 4; });
  fragments_cover();
  addresses_cover("a_address", a_address);
  addresses_cover("a_address_transposed", a_address_transposed);
  addresses_cover("b_address", b_address);
  addresses_cover("b_address_transposed", b_address_transposed);
  for (int64_t rows = 1; rows < 20; ++rows)
    for (int64_t columns = 1; columns < 8; ++columns)
      for (int64_t band : {1, 4, 8}) tiles_cover(rows, columns, band);
  descriptors_agree();
  tiles_by_group<208, 8>();
  tiles_by_group<272, 10>();
  tiles_by_group<64, 16>();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
