// What the attention kernels of wgmma share: tiles of tokens in shared memory, and stores of whole sectors.
#pragma once

#include "attention.cuh"
#include "hopper_instructions.cuh"

#ifdef VIT_CUDA_HOPPER

namespace vit::cuda {

// Starts the copies of tokens 0 .. rows - 1 of a head into a tile that wgmma reads without swizzle, heads of any
// multiple of 8; zeros from token `count` and element D on.
template <class T, int kD>
__device__ inline void load_by_group(Vector<T, 8>* tile, const Head<T>& head, int rows, int count, int D, int threads) {
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * (kD / 8); i += threads) {
    const auto [row, group] = by_group_copy(i, kD / 8);
    const bool valid = row < count && 8 * group < D;
    copy_async_16(tile + by_group(rows, row, group), valid ? head.data + row * head.token + 8 * group : head.data,
                  valid ? 16 : 0);
  }
}

// Writes a warp's c fragments of 16 tokens, times a factor per row. A thread has pairs of columns; four groups of 8 are
// exchanged within a quad of lanes, so that each has 8 neighbours: whole sectors.
template <class T, int kD>
__device__ inline void store_vectors(const Head<T>& head, const float (&sum)[kD / 2], int first, int count, int D,
                                     const float (&factor)[2], int lane) {
#pragma unroll
  for (int group = 0; group < kD / 8; group += 4)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (group + j) + 2 * r;
        pairs[j] = group + j < kD / 8 ? pack<T>(sum[i] * factor[r], sum[i + 1] * factor[r]) : 0;
      }
      transpose_quad(pairs, lane);
      const int token = first + fragment_row(lane, 2 * r);
      const int d = 8 * (group + lane % 4);
      if (token < count && d < D)
        *reinterpret_cast<Vector<uint32_t, 4>*>(head.data + token * head.token +
                                                d) = {{pairs[0], pairs[1], pairs[2], pairs[3]}};
    }
}

}  // namespace vit::cuda

#endif  // VIT_CUDA_HOPPER
