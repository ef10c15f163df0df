// The product of 16-bit operands on Hopper: the tensor memory accelerator fills shared memory, wgmma multiplies.
//
// A persistent block of three warpgroups. One thread of the first is the producer: it runs ahead through all tiles of
// the block and keeps kStages tiles of 64 k in flight. The other two warpgroups take the block's output tiles in turn
// (ping-pong): while one writes its tile (bias, GELU, residual: as long as the product itself at K = 384), the other
// keeps the tensor cores busy. Two blocks of a cluster take tiles one above the other and share the tile of b: each
// loads half of it for both, which cuts the traffic from L2 by 30 % at 128 x 192.
//
// Bytes from L2 per 64 k and tile: 128 (kM + kN / kCluster); FLOP 128 kM kN: 110 FLOP per byte at 128 x 192 and
// clusters of 2. Every output element adds its products in steps of 16 k from k = 0 on, whatever the tile.
#include "gemm.cuh"
#include "hopper_instructions.cuh"
#include "layout.cuh"

namespace vit::cuda {
namespace {

constexpr int kHopperK = 64;  // 128 bytes, the width of the swizzle
constexpr int kHopperThreads = 384;
constexpr int kHopperShared = 227 * 1024;

// Of the registers the block starts with (65536, in steps of 8 per thread), the producer gives the consumers theirs.
// One more, and the consumers would wait for it for ever.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * (kProducerRegisters + 2 * kConsumerRegisters) <= 65536 / kHopperThreads / 8 * 8 * kHopperThreads);

template <int kM, int kN>
struct HopperTile {
  static constexpr int kBytesA = kM * kHopperK * 2, kBytesB = kN * kHopperK * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kStages = (kHopperShared - 1024) / kStageBytes < 8 ? (kHopperShared - 1024) / kStageBytes : 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // barriers behind the tiles
};

// What of a Gemm the kernel needs besides the epilogue. Tiles are numbered (plane, band, column, row), in 32 bits:
// 2^31 of them would be an output of 16 TB, and registers are what this kernel is short of.
struct HopperWork {
  int tiles_m, tiles_n, tiles;  // tiles_m counts clusters; all planes in tiles
  int batches, K, K_split;
  bool a_batched, b_batched;
};

struct HopperPlace {
  int plane, m, n, k_begin, steps;
};

template <int kM, int kN, int kCluster>
__device__ inline HopperPlace hopper_place(const HopperWork& work, int tile, int rank) {
  const int per_plane = work.tiles_m * work.tiles_n, plane = tile / per_plane;
  const auto at = tile_at(tile % per_plane, work.tiles_m, work.tiles_n, 16 / kCluster);
  const int begin = plane / work.batches * work.K_split;
  const int length = work.K - begin < work.K_split ? work.K - begin : work.K_split;
  return {plane, (at.row * kCluster + rank) * kM, at.column * kN, begin, (length + kHopperK - 1) / kHopperK};
}

#ifdef VIT_CUDA_HOPPER

// The place in the pipeline of stages, and the parity of its current round.
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  template <int stages>
  __device__ void advance(int steps) {
    stage += steps;
    parity ^= stage / stages % 2;
    stage %= stages;
  }
};

// One operand's share of a stage: rows row.. of k, in boxes of 64 m or n where those are adjacent.
template <int kRows, bool kKMajor>
__device__ inline void hopper_load(unsigned char* to, const TensorMap* map, uint64_t* full, int row, int k, int batch) {
  if constexpr (kKMajor) {
    tensor_load(to, map, full, k, row, batch);
  } else {
#pragma unroll
    for (int i = 0; i < kRows / 64; ++i) tensor_load(to + i * 8192, map, full, row + 64 * i, k, batch);
  }
}

// The operand both blocks of a cluster use: block `rank` loads its half for both.
template <int kRows, bool kKMajor>
__device__ inline void hopper_load_half(unsigned char* to, const TensorMap* map, uint64_t* full, int row, int k,
                                        int batch, int rank) {
  constexpr int kHalf = kRows / 2;
  to += rank * kHalf * 128;
  if constexpr (kKMajor) {
    tensor_load_multicast(to, map, full, k, row + rank * kHalf, batch, 3);
  } else {
    static_assert(kHalf % 64 == 0, "a half is whole boxes of 64 columns");
#pragma unroll
    for (int i = 0; i < kHalf / 64; ++i)
      tensor_load_multicast(to + i * 8192, map, full, row + rank * kHalf + 64 * i, k, batch, 3);
  }
}

// Writes a warpgroup's tile. A thread holds, for each 64 rows, two rows and the column pairs of every group of 8. Four
// such groups are exchanged within a quad of lanes, so that each has 8 neighbours: accesses of 16 bytes and whole
// sectors for one shuffle per element, a twelfth of the tile's time on the shared-memory pipe at K = 768.
//
// Half of the columns at a time, the sums of the others moved up in between: 96 moves beside about 6700 instructions at
// 128 x 192, for half of the code, which else is 100 KB in a straight line and half of the time to compile this file.
template <class T, int kM, int kN>
__device__ inline void hopper_epilogue(const Epilogue<T>& e, const HopperPlace& at, float (&sum)[kM / 64][kN / 2]) {
  constexpr int kColumns = kN / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = at.m + 16 * warp + lane / 4;
  const int column = at.n + 8 * (lane % 4);
  const int64_t index = (at.plane * e.M + row) * e.N + column;
#pragma unroll 1
  for (int first = 0; first < kN; first += kColumns) {
#pragma unroll
    for (int group = 0; group < kColumns / 8; group += 4)
#pragma unroll
      for (int i = 0; i < kM / 64; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float pair[2][4], z[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) pair[j % 2][j / 2] = sum[i][4 * (group + j / 2) + 2 * half + j % 2];
          transpose_quad(pair[0], lane);
          transpose_quad(pair[1], lane);
#pragma unroll
          for (int j = 0; j < 8; ++j) z[j] = pair[j % 2][j / 2];
          const int down = 64 * i + 8 * half, right = first + 8 * group;
          if (row + down >= static_cast<int>(e.M) || column + right >= static_cast<int>(e.N)) continue;
          if (e.bias && !e.partial) {
            float bias[8];
            e.bias.load(column + right, bias);
#pragma unroll
            for (int j = 0; j < 8; ++j) z[j] += bias[j];
          }
          e.finish(index + down * e.N + right, column + right, z);
        }
#pragma unroll
    for (int i = 0; i < kM / 64; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) sum[i][j] = sum[i][j + kColumns / 2];
  }
}

// The sums over k of a's rows, where those are adjacent (a weight gradient): ordinary loads of a warpgroup from the
// stage that wgmma multiplies meanwhile. A warp has 32 rows; lane l has 8 of them, group l % 4, and every eighth k. Two
// k of a quarter of the warp differ by 4, which the swizzle keeps on different banks. 136 of a step's 512 clocks of
// wgmma are taken by their instructions at 128 x 128.
template <class T>
__device__ inline void hopper_add_rows(float (&sum)[8], const unsigned char* tile_a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int group = 4 * warp + lane % 4, first = lane / 4 % 2 * 4 + lane / 8;
#pragma unroll
  for (int k = first; k < kHopperK; k += 8) {
    float values[8];
    load_vector(reinterpret_cast<const T*>(tile_a + group / 8 * 8192 + 16 * swizzle_8<8>(k, group % 8)), values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += values[j];
  }
  __syncwarp();  // the arrival that frees the stage is one lane's
}

template <class T>
__device__ inline void hopper_store_rows(const Epilogue<T>& e, const HopperPlace& at, float (&sum)[8]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) sum[j] += shuffle_xor(sum[j], mask);
    if (lane < 4) e.apply_row(at.plane, at.m + 32 * warp + 8 * lane + j, sum[j]);
  }
}

#endif  // VIT_CUDA_HOPPER

template <class T, int kM, int kN, bool kKMajorA, bool kKMajorB, int kCluster>
__global__ void __launch_bounds__(kHopperThreads, 1)
    gemm_hopper_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                       HopperWork work, Epilogue<T> epilogue) {
#ifdef VIT_CUDA_HOPPER
  using Tile = HopperTile<kM, kN>;
  constexpr int kStages = Tile::kStages;
  unsigned char* shared = shared_memory();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * Tile::kStageBytes);
  uint64_t* empty = full + kStages;
  const int group = threadIdx.x / 128, rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int clusters = gridDim.x / kCluster, mine = blockIdx.x / kCluster;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i,
                   4 * kCluster);  // one arrival per warp of the warpgroup that used the stage, in each block
    }
    barrier_init_fence();
  }
  if (kCluster > 1)
    cluster_barrier();
  else
    __syncthreads();
  wait_on_dependent_grids();
  launch_dependent_grids();

  if (group == 0) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&map_a);
      prefetch_tensor_map(&map_b);
      PipelineState pipeline;
      for (int tile = mine; tile < work.tiles; tile += clusters) {
        const HopperPlace at = hopper_place<kM, kN, kCluster>(work, tile, rank);
        const int batch = at.plane % work.batches;
        const int batch_a = work.a_batched ? batch : 0, batch_b = work.b_batched ? batch : 0;
        for (int step = 0; step < at.steps; ++step) {
          barrier_wait(empty + pipeline.stage, pipeline.parity ^ 1);
          unsigned char* to = shared + pipeline.stage * Tile::kStageBytes;
          uint64_t* barrier = full + pipeline.stage;
          const int k = at.k_begin + step * kHopperK;
          barrier_expect(barrier, Tile::kStageBytes);
          hopper_load<kM, kKMajorA>(to, &map_a, barrier, at.m, k, batch_a);
          if constexpr (kCluster > 1)
            hopper_load_half<kN, kKMajorB>(to + Tile::kBytesA, &map_b, barrier, at.n, k, batch_b, rank);
          else
            hopper_load<kN, kKMajorB>(to + Tile::kBytesA, &map_b, barrier, at.n, k, batch_b);
          pipeline.template advance<kStages>(1);
        }
      }
    }
    __syncwarp();  // the barrier below wants whole warps
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    const int lane = threadIdx.x % 32;
    const auto release = [&](int stage) {
      if (lane < kCluster) barrier_arrive(empty + stage, static_cast<uint32_t>(lane));
    };
    // A warpgroup starts a tile when the other has seen all of its own arrive: the parity of a stage tells two rounds
    // apart, not three, so nobody may run more than one round behind. Named barriers 1 and 2, one per warpgroup.
    const int other = 3 - group;
    if (group == 2) named_barrier_arrive(other, 256);
    PipelineState pipeline;
    int turn = 0;
    for (int tile = mine; tile < work.tiles; tile += clusters, ++turn) {
      const HopperPlace at = hopper_place<kM, kN, kCluster>(work, tile, rank);
      if (turn % 2 != group - 1) {  // the other warpgroup's tile
        pipeline.template advance<kStages>(at.steps);
        continue;
      }
      named_barrier_wait(group, 256);
      float sum[kM / 64][kN / 2];
      [[maybe_unused]] float row_sum[8] = {};
      bool sums_rows = false;
      if constexpr (!kKMajorA) sums_rows = epilogue.sums_rows(at.n);
      for (int step = 0; step < at.steps; ++step) {
        barrier_wait(full + pipeline.stage, pipeline.parity);
        const uint32_t tile_a = shared_address(shared + pipeline.stage * Tile::kStageBytes);
        const uint32_t tile_b = tile_a + Tile::kBytesA;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kHopperK; k += 16)
#pragma unroll
          for (int i = 0; i < kM / 64; ++i)
            Wgmma<T, kN, !kKMajorA, !kKMajorB>::issue(sum[i], operand_descriptor<!kKMajorA>(tile_a, 64 * i, k),
                                                      operand_descriptor<!kKMajorB>(tile_b, 0, k), step > 0 || k > 0);
        wgmma_commit();
        if constexpr (!kKMajorA) {
          static_assert(kM == 128, "32 rows for each of 4 warps");
          if (sums_rows) hopper_add_rows<T>(row_sum, shared + pipeline.stage * Tile::kStageBytes);
        }
        wgmma_wait<1>();  // the step before is done with its stage
        if (step > 0) release(pipeline.stage == 0 ? kStages - 1 : pipeline.stage - 1);
        pipeline.template advance<kStages>(1);
      }
      if (tile + clusters < work.tiles) named_barrier_arrive(other, 256);
      wgmma_wait<0>(sum);
      release(pipeline.stage == 0 ? kStages - 1 : pipeline.stage - 1);
      if (sums_rows) hopper_store_rows(epilogue, at, row_sum);
      hopper_epilogue<T, kM, kN>(epilogue, at, sum);
    }
  }
  if (kCluster > 1) cluster_barrier();  // the other block may still write to, or arrive at, this one's shared memory
#endif
}

// Which of the compiled tiles a product gets. 128 x 192 moves the fewest bytes and is used where it wastes no columns;
// few rows (small batches) get 64 x 64 so that there is work for every multiprocessor.
struct HopperChoice {
  int m, n, cluster;
};

constexpr HopperChoice hopper_choice(int64_t M, int64_t N, int64_t planes, bool columns_a, bool columns_b) {
  const int64_t tiles = (M + 127) / 128 * ((N + 127) / 128) * planes;
  if (!columns_a && tiles < 66) return {64, 64, 1};
  if (!columns_a && !columns_b && N % 192 == 0) return {128, 192, 2};
  return {128, 128, 2};
}

template <class T, int kM, int kN, bool kKMajorA, bool kKMajorB, int kCluster>
void launch_hopper(const char* op, const Gemm& g, const Context& context) {
  using Tile = HopperTile<kM, kN>;
  const bool bfloat16 = g.dtype == DType::bfloat16;
  const auto encode = [&](const Operand& o, bool k_major, int64_t rows, int box_rows, TensorMap& map) {
    const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    const uint64_t batches = o.batch == 0 ? 1 : size(g.batch);
    const uint64_t dims[3] = {size(k_major ? g.K : rows), size(k_major ? rows : g.K), batches};
    const int64_t across = k_major ? o.row : o.k;
    const uint64_t strides[2] = {size(across) * 2, size(o.batch == 0 ? 8 : o.batch) * 2};
    const int box1 = k_major ? box_rows : kHopperK;
    if (!encode_tensor_map(map, o.data, bfloat16, dims, strides, 64, static_cast<uint32_t>(box1)))
      fail(op, "the driver refuses a tensor map for " + Shape({{"M", g.M}, {"N", g.N}, {"K", g.K}}).text());
  };
  TensorMap map_a, map_b;
  encode(g.a, kKMajorA, g.M, kM, map_a);
  encode(g.b, kKMajorB, g.N, kN / kCluster, map_b);
  const auto small = [](int64_t n) { return static_cast<int>(n); };  // hopper_supports looks at M, N, K and batch
  HopperWork work;
  work.tiles_m = small(divide_up(g.M, kM * kCluster));
  work.tiles_n = small(divide_up(g.N, kN));
  const int64_t tiles = int64_t{work.tiles_m} * work.tiles_n * g.batch * g.splits;
  if (tiles > 0x3fffffff) fail(op, "has more than 2^30 tiles");
  work.tiles = small(tiles);
  work.batches = small(g.batch);
  work.K = small(g.K);
  work.K_split = small(divide_up(divide_up(g.K, kHopperK), g.splits) * kHopperK);
  work.a_batched = g.a.batch != 0;
  work.b_batched = g.b.batch != 0;
  const int64_t clusters = smaller<int64_t>(tiles, larger(1, multiprocessors(context.device) / kCluster));
  launch<gemm_hopper_kernel<T, kM, kN, kKMajorA, kKMajorB, kCluster>>(
      {op, Shape({{"batch", g.batch}, {"M", g.M}, {"N", g.N}, {"K", g.K}}), context, clusters * kCluster,
       kHopperThreads, static_cast<std::size_t>(Tile::kSharedBytes), kCluster, true},
      map_a, map_b, work, Epilogue<T>(g));
}

template <class T>
void run(const char* op, const Gemm& g, const Context& context) {
  const Access a = access(g.a, g.dtype), b = access(g.b, g.dtype);
  const HopperChoice choice = hopper_choice(g.M, g.N, g.batch * g.splits, !a.k_major, !b.k_major);
  if (!a.k_major) return launch_hopper<T, 128, 128, false, false, 2>(op, g, context);
  if (!b.k_major) {
    if (choice.m == 64) return launch_hopper<T, 64, 64, true, false, 1>(op, g, context);
    return launch_hopper<T, 128, 128, true, false, 2>(op, g, context);
  }
  if (choice.m == 64) return launch_hopper<T, 64, 64, true, true, 1>(op, g, context);
  if (choice.n == 192) return launch_hopper<T, 128, 192, true, true, 2>(op, g, context);
  launch_hopper<T, 128, 128, true, true, 2>(op, g, context);
}

}  // namespace

void gemm_hopper(const char* op, const Gemm& g, const Context& context) {
  if (g.dtype == DType::bfloat16) return run<bf16>(op, g, context);
  run<f16>(op, g, context);
}

}  // namespace vit::cuda
