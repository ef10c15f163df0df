// The product of gemm_mma.cu and linear_8bit.cuh: tiles of both operands in shared memory, products of the tensor
// cores.
//
// Tensor cores of compute capability 8.0 and up: mma.m16n8k16 of 16-bit operands, mma.m16n8k8 of float32 operands
// rounded to TF32 on their way into registers, mma.m16n8k32 of bytes: int8, whose sums are 32-bit integers, and on 8.9
// and up e4m3. cp.async brings tiles into shared memory, kStages tiles ahead.
//
// One block of 4 warps computes a kTile x kTile tile of out, each warp a quarter of it. Per tile of 64 bytes of k the
// block reads 2 kTile 64 bytes and does 2 kTile^2 FLOP per k: 64 FLOP per byte at kTile = 128 in 16 bits, 32 in TF32,
// 128 in bytes. Every output element adds its products in steps of 32 bytes of k from k = 0 on, whatever the tile size,
// so the tile may depend on M (batch invariance).
#pragma once

#include "gemm.cuh"

namespace vit::cuda {

inline constexpr int kTileBytes = 64;  // of k
template <class T>
inline constexpr int kTileK = kTileBytes / static_cast<int>(sizeof(T));
inline constexpr int kStages = 4;
inline constexpr int kGemmThreads = 128;

// A tile of kRows rows (m or n) by kTileK of one operand in shared memory: as rows of k when k is adjacent in memory,
// else as kTileK rows of m or n, so that global memory is read along its adjacent elements in both cases. Groups are of
// 16 bytes.
template <class T, int kRows, bool kKMajor>
struct Tile {
  static constexpr int kGroup = kVector<T>, kGroups = kRows * kTileK<T> / kGroup;
  static constexpr int kGroupsPerLine = (kKMajor ? kTileK<T> : kRows) / kGroup;

  __device__ static T* at(T* tile, int line, int group) {
    if constexpr (kKMajor)
      return tile + kGroup * swizzle_4(line, group);
    else if constexpr (sizeof(T) == 2)
      return tile + kGroup * swizzle_8<kGroupsPerLine>(line, group);
    else
      return tile + kGroup * swizzle_words<kGroupsPerLine>(line, group);
  }

  // Brings rows [row, row + kRows) and k [k, k + kTileK) into `tile`, zeros beyond `rows` and `K`.
  __device__ static void load(T* tile, const Operand& o, const T* data, bool vectors, int64_t row, int64_t rows,
                              int64_t k, int64_t K) {
    if (!vectors) return load_elements(tile, data, o.row, o.k, row, rows, k, K);
#pragma unroll
    for (int i = 0; i < kGroups / kGemmThreads; ++i) {
      const int index = i * kGemmThreads + static_cast<int>(threadIdx.x);
      const int line = index / kGroupsPerLine, group = index % kGroupsPerLine;
      const int64_t r = row + (kKMajor ? line : kGroup * group), c = k + (kKMajor ? kGroup * group : line);
      const int64_t left = r < rows && c < K ? (kKMajor ? K - c : rows - r) : 0;
      const int count = left < kGroup ? static_cast<int>(left) : kGroup;
      copy_async_16(at(tile, line, group), count > 0 ? data + r * o.row + c * o.k : data,
                    count * static_cast<int>(sizeof(T)));
    }
  }

  // The same for operands that 16-byte copies cannot read. Rare, and kept out of the kernels for the sake of the build.
  __device__ __noinline__ static void load_elements(T* tile, const T* data, int64_t row_stride, int64_t k_stride,
                                                    int64_t row, int64_t rows, int64_t k, int64_t K) {
    constexpr int kLine = kGroupsPerLine * kGroup;  // elements
    for (int i = threadIdx.x; i < kRows * kTileK<T>; i += kGemmThreads) {
      const int line = i / kLine, place = i % kLine;
      const int64_t r = row + (kKMajor ? line : place), c = k + (kKMajor ? place : line);
      at(tile, line, place / kGroup)[place % kGroup] = r < rows && c < K ? data[r * row_stride + c * k_stride] : T{0};
    }
  }

  // The a fragment of rows row..row + 15 and kMmaK from k on, relative to the tile; prepare_fragment makes it ready.
  __device__ static void load_a(uint32_t (&fragment)[4], T* tile, int row, int k, int lane) {
    if constexpr (kKMajor) {
      const MatrixAddress m = a_address(lane);
      load_matrices(fragment, at(tile, row + m.row, k / kGroup + m.group));
    } else if constexpr (sizeof(T) == 2) {
      const MatrixAddress m = a_address_transposed(lane);
      load_matrices_transposed(fragment, at(tile, k + m.row, row / kGroup + m.group));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = word(tile, row + 8 * (i % 2), k + 4 * (i / 2), lane);
    }
  }

  // The b fragments of rows (n) row..row + 7 and row + 8..row + 15.
  __device__ static void load_b(uint32_t (&fragment)[4], T* tile, int row, int k, int lane) {
    if constexpr (kKMajor) {
      const MatrixAddress m = b_address(lane);
      load_matrices(fragment, at(tile, row + m.row, k / kGroup + m.group));
    } else if constexpr (sizeof(T) == 2) {
      const MatrixAddress m = b_address_transposed(lane);
      load_matrices_transposed(fragment, at(tile, k + m.row, row / kGroup + m.group));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = word(tile, row + 8 * (i / 2), k + 4 * (i % 2), lane);
    }
    prepare_fragment<T>(fragment);
  }

 private:
  // The element of a lane in the 8 rows from `row` and the 4 k from `k` on: ldmatrix transposes 16-bit elements alone.
  __device__ static uint32_t word(T* tile, int row, int k, int lane) {
    const int m = row + lane / 4;
    return *reinterpret_cast<const uint32_t*>(at(tile, k + lane % 4, m / kGroup) + m % kGroup);
  }
};

// c += the sums of the rows of an a fragment that is not prepared, exact in float32 also for TF32. 16 bits: every
// column of c is the sum, by a product with ones. float32: elements 0 and 2 are, once the four lanes of a row are
// added.
template <class T>
__device__ inline void add_rows(float (&c)[4], const uint32_t (&a)[4]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t ones = pack<T>(1.0f, 1.0f);
    mma_16x8<T>(c, a, ones, ones);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i % 2 * 2] += __uint_as_float(a[i]);
  }
}

template <class T, int kTile, bool kKMajorA, bool kKMajorB, class E>
__global__ void __launch_bounds__(kGemmThreads)
    gemm_mma_kernel(Operand a, Operand b, int64_t batches, int64_t K, int64_t K_split, bool a_vectors, bool b_vectors,
                    const __grid_constant__ E epilogue) {
  using Sum = MmaSum<T>;
  using TileA = Tile<T, kTile, kKMajorA>;
  using TileB = Tile<T, kTile, kKMajorB>;
  constexpr int kWarpTile = kTile / 2, kMs = kWarpTile / 16, kNs = kWarpTile / 8;
  constexpr int kOperandElements = kTile * kTileK<T>;
  // e4m3 has products that wait beside the sums: with both steps of k at once 160 bytes of registers were spilled.
  constexpr int kUnroll = std::is_same<T, e4m3>::value ? 1 : kTileK<T> / kMmaK<T>;
  T* shared = reinterpret_cast<T*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const BlockPart<T, kTile> part(blockIdx.x, a, b, epilogue.M, epilogue.N, K, K_split, batches);
  const int64_t length = part.k_end - part.k_begin;
  const int steps = length > 0 ? static_cast<int>((length + kTileK<T> - 1) / kTileK<T>) : 0;

  const auto load = [&](int step) {
    T* stage = shared + step % kStages * (2 * kOperandElements);
    const int64_t k = part.k_begin + static_cast<int64_t>(step) * kTileK<T>;
    TileA::load(stage, a, part.a, a_vectors, part.m, epilogue.M, k, part.k_end);
    TileB::load(stage + kOperandElements, b, part.b, b_vectors, part.n, epilogue.N, k, part.k_end);
  };

  // Both warps of a row of the tile have its fragments of a, and sum the rows of a half of them.
  constexpr bool kCanSum = !kKMajorA && !kKMajorB;
  [[maybe_unused]] float row_sum[kCanSum ? kMs / 2 : 1][4] = {};
  [[maybe_unused]] bool sums_rows = false;
  if constexpr (kCanSum) sums_rows = epilogue.sums_rows(part.n);

  Sum sum[kMs][kNs][4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // tile `step` is here, and everybody is done with the one that `load` now overwrites
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    copy_async_commit();
    T* tile_a = shared + step % kStages * (2 * kOperandElements);
    T* tile_b = tile_a + kOperandElements;
#pragma unroll kUnroll
    for (int k = 0; k < kTileK<T>; k += kMmaK<T>) {
      uint32_t fragment_a[kMs][4], fragment_b[kNs / 2][4];
#pragma unroll
      for (int i = 0; i < kMs; ++i) TileA::load_a(fragment_a[i], tile_a, warp / 2 * kWarpTile + 16 * i, k, lane);
#pragma unroll
      for (int j = 0; j < kNs / 2; ++j) TileB::load_b(fragment_b[j], tile_b, warp % 2 * kWarpTile + 16 * j, k, lane);
      if constexpr (kCanSum) {
        if (sums_rows) {
#pragma unroll
          for (int i = 0; i < kMs / 2; ++i) {
            if (warp % 2)
              add_rows<T>(row_sum[i], fragment_a[i + kMs / 2]);
            else
              add_rows<T>(row_sum[i], fragment_a[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kMs; ++i) prepare_fragment<T>(fragment_a[i]);
#pragma unroll
      for (int i = 0; i < kMs; ++i)
#pragma unroll
        for (int j = 0; j < kNs; ++j)
          mma_16x8<T>(sum[i][j], fragment_a[i], fragment_b[j / 2][j % 2 * 2], fragment_b[j / 2][j % 2 * 2 + 1]);
    }
  }

  if constexpr (kCanSum) {
    if (sums_rows) {
#pragma unroll
      for (int i = 0; i < kMs / 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float all = row_sum[i][2 * half];
          if constexpr (sizeof(T) == 4) {
            all += shuffle_xor(all, 1);
            all += shuffle_xor(all, 2);
          }
          const int row = warp / 2 * kWarpTile + 16 * (warp % 2 * kMs / 2 + i) + fragment_row(lane, 2 * half);
          if (lane % 4 == 0) epilogue.apply_row(part.plane, part.m + row, all);
        }
    }
  }

  // The sums go through shared memory: a fragment holds pairs of columns, memory wants whole lines.
  constexpr int kPitch = kTile + 8;  // 8 rows of a fragment start 8 banks apart
  Sum* sums = reinterpret_cast<Sum*>(shared_memory());
  copy_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMs; ++i)
#pragma unroll
    for (int j = 0; j < kNs; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp / 2 * kWarpTile + 16 * i + fragment_row(lane, 2 * half);
        const int column = warp % 2 * kWarpTile + 8 * j + fragment_column(lane, 0);
        *reinterpret_cast<Vector<Sum, 2>*>(sums + row * kPitch +
                                           column) = {{sum[i][j][2 * half], sum[i][j][2 * half + 1]}};
      }
  __syncthreads();
  apply_tile<kTile, kGemmThreads, kPitch>(epilogue, sums, part.plane, part.m, part.n);
}

// 128 x 128 tiles when there are enough of them for two blocks on each multiprocessor of a large GPU, else 64 x 64.
constexpr int mma_tile(int64_t M, int64_t N, int64_t planes) {
  return (M + 127) / 128 * ((N + 127) / 128) * planes >= 200 ? 128 : 64;
}

// The tiles under way, and after them the sums: 68 KiB at 128 x 128.
constexpr int mma_shared_bytes(int tile) {
  const int stages = kStages * 2 * tile * kTileBytes, sums = tile * (tile + 8) * 4;
  return stages > sums ? stages : sums;
}
static_assert(mma_shared_bytes(128) <= kLeastShared, "must run on every GPU");

}  // namespace vit::cuda
