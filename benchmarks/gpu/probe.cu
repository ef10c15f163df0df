// Hopper's instructions one at a time, as csrc/cuda uses them, against sums on the host: half a minute on a GPU says
// which assumption of the kernels is wrong, before whole kernels are run. probe.py compiles and starts it:
//
//   probe            the names
//   probe NAME       runs one: nothing is printed and the exit code is 0 when all is as assumed
//
// All data are small integers, exact in every type, so results must be equal. The emulator of the tests runs it too.
// Longer than 400 lines: one program of one file, which a machine with a GPU compiles by one command.
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hopper_instructions.cuh"
#include "layout.cuh"
#include "types.cuh"

using namespace vit::cuda;

namespace {

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Elements on the host and, while this lives, on the device.
template <class T>
struct Array {
  std::vector<T> host;
  T* device = nullptr;

  explicit Array(std::size_t n) : host(n) { require(cudaMalloc(&device, n * sizeof(T)), "cudaMalloc"); }
  ~Array() { cudaFree(device); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void send() const { require(copy(device, host.data(), cudaMemcpyHostToDevice), "copy to the device"); }
  void fetch() { require(copy(host.data(), device, cudaMemcpyDeviceToHost), "copy from the device"); }

 private:
  cudaError_t copy(void* to, const void* from, cudaMemcpyKind kind) const {
    return cudaMemcpy(to, from, host.size() * sizeof(T), kind);
  }
};

// -4 .. 4 in bfloat16.
bf16 small(int x) {
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}

// A [rows, columns] matrix of such numbers on the device.
struct Matrix {
  int rows, columns;
  Array<bf16> data;
  std::vector<int> value;

  Matrix(int rows_, int columns_, uint32_t seed)
      : rows(rows_), columns(columns_), data(rows * columns), value(rows * columns) {
    for (int i = 0; i < rows * columns; ++i) {
      seed = seed * 1664525 + 1013904223;
      value[i] = static_cast<int>(seed >> 16) % 9 - 4;
      data.host[i] = small(value[i]);
    }
    data.send();
  }
  int at(int row, int column) const { return value[row * columns + column]; }
};

// Does not wait for its end. overlaps: nor does it begin after the end of the launch in front.
template <auto kernel, class... Args>
void start(int blocks, int threads, int cluster, bool overlaps, Args... args) {
  constexpr int kShared = 100 * 1024;
  require(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
      "permission for shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = kShared;
  cudaLaunchAttribute attribute = {};
  if (overlaps) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = overlaps || cluster > 1 ? 1 : 0;
  require(cudaLaunchKernelEx(&config, kernel, args...), "launch");
}

template <auto kernel, class... Args>
void run(int blocks, int threads, int cluster, Args... args) {
  start<kernel>(blocks, threads, cluster, false, args...);
  require(cudaDeviceSynchronize(), "run");
}

// Compares n results with what they should be.
template <class T>
void compare(const std::vector<T>& got, std::size_t n, const std::function<T(int)>& want) {
  int wrong = 0, first = -1;
  for (std::size_t i = 0; i < n; ++i)
    if (got[i] != want(static_cast<int>(i)) && wrong++ == 0) first = static_cast<int>(i);
  if (wrong == 0) return;
  throw std::runtime_error(std::to_string(wrong) + " of " + std::to_string(n) + " wrong, the first at " +
                           std::to_string(first) + ": " + std::to_string(got[first]) + " for " +
                           std::to_string(want(first)));
}

// out[m, n] = sum over k of a(m, k) b(k, n), out [m, columns] as floats.
void compare_product(const Array<float>& out, int m, int columns, int k, const std::function<int(int, int)>& a,
                     const std::function<int(int, int)>& b) {
  compare<float>(out.host, static_cast<std::size_t>(m) * columns, [&](int i) {
    int sum = 0;
    for (int j = 0; j < k; ++j) sum += a(i / columns, j) * b(j, i % columns);
    return static_cast<float>(sum);
  });
}

// Writes the sums of a warpgroup to [64, 2 n].
template <int n>
__device__ inline void store(float* out, const float (&sum)[n]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int i = 0; i < n; ++i)
    out[(16 * warp + fragment_row(lane, i % 4)) * 2 * n + 8 * (i / 4) + fragment_column(lane, i % 4)] = sum[i];
}

// ---- where dynamic shared memory begins ----

__global__ void shared_kernel(int* out) { *out = static_cast<int>(shared_address(shared_memory()) % 1024); }

void shared() {
  Array<int> out(1);
  out.host[0] = -1;
  out.send();
  run<shared_kernel>(1, 32, 1, out.device);
  out.fetch();
  compare<int>(out.host, 1, [](int) { return 0; });
}

// ---- mma.sync and ldmatrix ----

__global__ void mma_kernel(const bf16* a, const bf16* b, float* out) {
  bf16* tile = reinterpret_cast<bf16*>(shared_memory());  // a [16, 16], b [16 n, 16 k]
  const int lane = threadIdx.x;
  for (int i = lane; i < 512; i += 32) tile[i] = i < 256 ? a[i] : b[i - 256];
  __syncwarp();
  uint32_t fa[4], fb[4];
  load_matrices(fa, tile + a_address(lane).row * 16 + a_address(lane).group * 8);
  load_matrices(fb, tile + 256 + b_address(lane).row * 16 + b_address(lane).group * 8);
  for (int half = 0; half < 2; ++half) {
    float sum[4] = {};
    mma_16x8<bf16>(sum, fa, fb[2 * half], fb[2 * half + 1]);
    for (int i = 0; i < 4; ++i) out[fragment_row(lane, i) * 16 + 8 * half + fragment_column(lane, i)] = sum[i];
  }
}

void mma() {
  const Matrix a(16, 16, 1), b(16, 16, 2);
  Array<float> out(256);
  run<mma_kernel>(1, 32, 1, a.data.device, b.data.device, out.device);
  out.fetch();
  compare_product(out, 16, 16, 16, [&](int m, int k) { return a.at(m, k); }, [&](int k, int n) { return b.at(n, k); });
}

// ---- wgmma through the descriptors of the 128-byte swizzle ----

// a and b lie as the tensor memory accelerator writes them: [rows, 64 k], or blocks of [64 k, 64 rows].
template <bool kMnMajor>
__global__ void swizzled_kernel(const bf16* a, const bf16* b, float* out) {
#ifdef VIT_CUDA_HOPPER
  bf16* tile_a = reinterpret_cast<bf16*>(shared_memory());
  bf16* tile_b = tile_a + 64 * 64;
  const auto fill = [](bf16* tile, const bf16* from, int rows) {
    for (int i = threadIdx.x; i < rows * 64; i += 128) {
      const int line = kMnMajor ? i / rows : i / 64, place = kMnMajor ? i % rows : i % 64;
      const int at = place / 64 * 4096 + swizzle_8<8>(line, place % 64 / 8) * 8 + place % 8;
      tile[at] = from[i];
    }
  };
  fill(tile_a, a, 64);
  fill(tile_b, b, 128);
  fence_for_wgmma();
  __syncthreads();
  float sum[64];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 64; k += 16)
    Wgmma<bf16, 128, kMnMajor, kMnMajor>::issue(sum, operand_descriptor<kMnMajor>(shared_address(tile_a), 0, k),
                                                operand_descriptor<kMnMajor>(shared_address(tile_b), 0, k), k > 0);
  wgmma_commit();
  wgmma_wait<0>(sum);
  store(out, sum);
#endif
}

void swizzled_rows() {
  const Matrix a(64, 64, 3), b(128, 64, 4);
  Array<float> out(64 * 128);
  run<swizzled_kernel<false>>(1, 128, 1, a.data.device, b.data.device, out.device);
  out.fetch();
  compare_product(out, 64, 128, 64, [&](int m, int k) { return a.at(m, k); }, [&](int k, int n) { return b.at(n, k); });
}

void swizzled_columns() {
  const Matrix a(64, 64, 5), b(64, 128, 6);
  Array<float> out(64 * 128);
  run<swizzled_kernel<true>>(1, 128, 1, a.data.device, b.data.device, out.device);
  out.fetch();
  compare_product(out, 64, 128, 64, [&](int m, int k) { return a.at(k, m); }, [&](int k, int n) { return b.at(k, n); });
}

// ---- wgmma through the descriptors without a swizzle, operand a in registers ----

// The tile of attention: `rows` tokens of `groups` times 8 elements, copied asynchronously.
__device__ inline void load_tile(Vector<bf16, 8>* tile, const bf16* from, int rows, int groups) {
  for (int i = threadIdx.x; i < rows * groups; i += 128) {
    const auto [row, group] = by_group_copy(i, groups);
    copy_async_16(tile + by_group(rows, row, group), from + (row * groups + group) * 8, 16);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

__device__ inline void load_fragment(uint32_t (&fragment)[4], const bf16* a, int columns, int k) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    fragment[i] = *reinterpret_cast<const uint32_t*>(a + (16 * warp + lane / 4 + 8 * (i % 2)) * columns + k +
                                                     2 * (lane % 4) + 8 * (i / 2));
}

// kRows: a[64, 80] times the second half of 272 rows of 80; else a[64, 208] times 208 rows of 80. `exchanged` looks
// whether the two distances of the descriptor are meant the other way round.
template <bool kRows>
__global__ void plain_kernel(const bf16* a, const bf16* b, float* out, bool exchanged) {
#ifdef VIT_CUDA_HOPPER
  constexpr int kKeys = kRows ? 272 : 208, kN = kRows ? 136 : 80, kK = kRows ? 80 : 208;
  Vector<bf16, 8>* tile = reinterpret_cast<Vector<bf16, 8>*>(shared_memory());
  load_tile(tile, b, kKeys, 10);
  uint32_t fragments[kK / 16][4];
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) load_fragment(fragments[k], a, kK, 16 * k);
  fence_for_wgmma();
  __syncthreads();
  float sum[kN / 2];
  wgmma_fence(fragments);
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
    uint64_t descriptor = kRows ? rows_descriptor(shared_address(tile), kKeys, 136, k)
                                : columns_descriptor(shared_address(tile), kKeys, 16 * k);
    if (exchanged)
      descriptor =
          (descriptor & ~0x3fff3fff0000) | (descriptor >> 32 & 0x3fff) << 16 | (descriptor >> 16 & 0x3fff) << 32;
    WgmmaRegisters<bf16, kN, !kRows>::issue(sum, fragments[k], descriptor, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(sum);
  store(out, sum);
#endif
}

template <bool kRows>
void plain() {
  const Matrix a(64, kRows ? 80 : 208, 7), b(kRows ? 272 : 208, 80, 8);
  Array<float> out(64 * 136);
  const auto attempt = [&](bool exchanged) {
    run<plain_kernel<kRows>>(1, 128, 1, a.data.device, b.data.device, out.device, exchanged);
    out.fetch();
    compare_product(
        out, 64, kRows ? 136 : 80, a.columns, [&](int m, int k) { return a.at(m, k); },
        [&](int k, int n) { return kRows ? b.at(136 + n, k) : b.at(k, n); });
  };
  try {
    attempt(false);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    try {
      attempt(true);
    } catch (const std::exception&) {
      throw std::runtime_error(text + "; nor with the two distances exchanged");
    }
    throw std::runtime_error(text + "; right with the two distances exchanged");
  }
}

// ---- the tensor memory accelerator ----

// One box of [64, 64] to the beginning of shared memory; block r of a cluster of two loads half of it for both.
template <int kCluster>
__global__ void load_kernel(const __grid_constant__ TensorMap map, int c0, int c1, int c2, uint16_t* out) {
#ifdef VIT_CUDA_HOPPER
  unsigned char* tile = shared_memory();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(tile + 8192);
  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  if (kCluster > 1)
    cluster_barrier();
  else
    __syncthreads();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&map);
    barrier_expect(barrier, 8192);
    if (kCluster > 1)
      tensor_load_multicast(tile + rank * 4096, &map, barrier, c0, c1 + 32 * rank, c2, 3);
    else
      tensor_load(tile, &map, barrier, c0, c1, c2);
  }
  __syncwarp();
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 4096; i += 128) out[rank * 4096 + i] = reinterpret_cast<const uint16_t*>(tile)[i];
  if (kCluster > 1) cluster_barrier();
#endif
}

// A tensor [dim2][dim1][dim0] in an array, its last box partly outside.
template <int kCluster>
void load(const uint64_t (&dims)[3], const uint64_t (&strides)[2], int c0, int c1, int c2) {
  const Matrix data(64, 96, 9);
  Array<uint16_t> out(kCluster * 4096);
  TensorMap map;
  if (!encode_tensor_map(map, data.data.device, true, dims, strides, 64, 64 / kCluster))
    throw std::runtime_error("the driver refuses the tensor map, or has no cuTensorMapEncodeTiled");
  run<load_kernel<kCluster>>(kCluster, 128, kCluster, map, c0, c1, c2, out.device);
  out.fetch();
  compare<uint16_t>(out.host, out.host.size(), [&](int i) {
    const int row = i % 4096 / 64, place = i % 64, column = (place / 8 ^ row % 8) * 8 + place % 8;
    const uint64_t x = static_cast<uint64_t>(c0 + column), y = static_cast<uint64_t>(c1 + row);
    if (x >= dims[0] || y >= dims[1]) return uint16_t{0};
    return data.data.host[x + (y * strides[0] + static_cast<uint64_t>(c2) * strides[1]) / 2].bits;
  });
}

void box() { load<1>({72, 20, 3}, {192, 20 * 192}, 16, 8, 1); }
void box_of_near_planes() { load<1>({40, 30, 2}, {192, 96}, 0, 0, 1); }  // planes nearer than rows: heads of tokens
void multicast() { load<2>({96, 60, 1}, {192, 16}, 32, 8, 0); }

// ---- barriers of another block, registers handed over, named barriers ----

// Three warpgroups as in the product: the first gives registers to the others, which take turns and arrive at the
// barriers of both blocks, one arrival per warp.
__global__ void __launch_bounds__(384, 1) turns_kernel(int* out) {
#ifdef VIT_CUDA_HOPPER
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 4 * 2);
    barrier_init_fence();
  }
  cluster_barrier();
  if (group == 0) {
    warpgroup_reg_dealloc<40>();
  } else {
    warpgroup_reg_alloc<232>();
    const int other = 3 - group;
    if (group == 2) named_barrier_arrive(other, 256);
    for (int round = group - 1; round < 6; round += 2) {
      named_barrier_wait(group, 256);
      if (lane < 2) barrier_arrive(barrier, static_cast<uint32_t>(lane));
      barrier_wait(barrier, static_cast<uint32_t>(round & 1));
      if (threadIdx.x % 128 == 0) out[cluster_rank() * 6 + round] = round + 1;
      if (round + 1 < 6) named_barrier_arrive(other, 256);
    }
  }
  cluster_barrier();
#endif
}

void turns() {
  Array<int> out(12);
  run<turns_kernel>(2, 384, 2, out.device);
  out.fetch();
  compare<int>(out.host, 12, [](int i) { return i % 6 + 1; });
}

// ---- a grid that begins before the one in front of it has ended ----

// Lets the next grid begin, writes some milliseconds later.
__global__ void slow_kernel(int* out, int rounds) {
#ifdef VIT_CUDA_HOPPER
  wait_on_dependent_grids();
  launch_dependent_grids();
  unsigned x = threadIdx.x;
  for (int i = 0; i < rounds; ++i) x = x * 1664525 + 1013904223;
  out[threadIdx.x] = static_cast<int>(x >> 8) + static_cast<int>(threadIdx.x);
  out[32 + threadIdx.x] = static_cast<int>(threadIdx.x);
#endif
}

// What two grids in front have written: the first by way of the second.
__global__ void next_kernel(const int* in, int* out) {
#ifdef VIT_CUDA_HOPPER
  wait_on_dependent_grids();
  launch_dependent_grids();
  out[threadIdx.x] = in[32 + threadIdx.x] + 1;
#endif
}

void overlap() {
  Array<int> first(64), second(64), third(64);
  for (auto* array : {&first, &second, &third}) array->send();
  start<slow_kernel>(1, 32, 1, false, first.device, 1 << 20);
  start<next_kernel>(1, 32, 1, true, static_cast<const int*>(first.device), second.device + 32);
  start<next_kernel>(1, 32, 1, true, static_cast<const int*>(second.device), third.device);
  require(cudaDeviceSynchronize(), "run");
  third.fetch();
  compare<int>(third.host, 32, [](int i) { return i + 2; });
}

const std::vector<std::pair<std::string, void (*)()>> kProbes = {
    {"shared memory is aligned to 1024", shared},
    {"mma.sync", mma},
    {"wgmma, swizzled rows", swizzled_rows},
    {"wgmma, swizzled columns", swizzled_columns},
    {"wgmma, plain rows, a in registers", plain<true>},
    {"wgmma, plain columns, a in registers", plain<false>},
    {"tensor map and load", box},
    {"tensor map of near planes", box_of_near_planes},
    {"multicast to a cluster", multicast},
    {"turns, registers and remote barriers", turns},
    {"a grid that begins before the one in front has ended", overlap},
};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& [name, probe] : kProbes) {
    if (count < 2) {
      std::puts(name.c_str());
      continue;
    }
    if (name != arguments[1]) continue;
    try {
      probe();
      return 0;
    } catch (const std::exception& error) {
      std::puts(error.what());
      return 1;
    }
  }
  return count < 2 ? 0 : 2;
}
