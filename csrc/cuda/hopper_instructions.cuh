// Instructions of Hopper (compute capability 9.0a): barriers in shared memory, the tensor memory accelerator, wgmma.
// VIT_CUDA_HOPPER is defined where they exist; kernels that use them are empty elsewhere and are never launched there.
// The emulator of the tests replaces this file, as it does instructions.cuh.
#ifndef VIT_CUDA_HOPPER_INSTRUCTIONS
#define VIT_CUDA_HOPPER_INSTRUCTIONS

#include <cuda.h>
#include <cuda_runtime.h>

#include "driver.cuh"
#include "instructions.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VIT_CUDA_HOPPER
#endif

namespace vit::cuda {

using TensorMap = CUtensorMap;

// Describes `data` as [dim2][dim1][dim0] elements of 16 bits, neighbours along dim0 adjacent, the other strides in
// bytes, read in boxes of [1][box1][box0] with the 128-byte swizzle; elements outside are zeros. False: the driver
// refuses.
inline bool encode_tensor_map(TensorMap& map, const void* data, bool bfloat16, const uint64_t (&dims)[3],
                              const uint64_t (&strides)[2], uint32_t box0, uint32_t box1) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static std::atomic<void*> known{nullptr};
  const auto encode = reinterpret_cast<Encode>(driver_function("cuTensorMapEncodeTiled", 12000, known));
  const uint32_t box[3] = {box0, box1, 1}, steps[3] = {1, 1, 1};
  return encode && encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                          const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#ifdef VIT_CUDA_HOPPER

// Programmatic dependent launch. Returns when the grids in front of this one have ended and their writes are visible;
// every thread calls it before it touches device memory (parameters are none). At once where the launch was an ordinary
// one.
__device__ inline void wait_on_dependent_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next grid may begin once every block of this one has called it. Behind the wait: whoever begins then, may read
// what was written two grids before it.
__device__ inline void launch_dependent_grids() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the accelerator and to the other block of the cluster.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and announces `bytes` that copies will deliver in this phase.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the barrier of the same place in block `rank` of the cluster. No data of ordinary writes travels between
// blocks: it says that wgmma is done with a stage. With the scope of a cluster it costs a fence of the whole GPU's
// memory in every step, and the wait below throws away the L1 cache.
__device__ inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Returns when the phase of the given parity is complete.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts the copy of the box at (c0, c1, c2); its bytes are counted by `barrier`.
__device__ inline void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The same into the same place of every block in `mask`, counted by the barrier of each.
__device__ inline void tensor_load_multicast(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                             uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(mask)
      : "memory");
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of every block of the cluster meets here.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barriers 1..15 of a block, for a part of its threads: some wait, some only arrive, `threads` of both together.
__device__ inline void named_barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int registers>
__device__ inline void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// The compiler may move neither a write of these registers behind this place nor a read before it: it takes a product
// for finished where it is issued (CUTLASS, cute/arch/mma_sm90_gmma.hpp, warpgroup_fence_operand).
__device__ inline void keep_in_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ inline void keep_in_place(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class R, int n>
__device__ inline void keep_in_place(R (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) keep_in_place(registers[i]);
}

// Before the first product of a group: what was written to `registers` (operands a) is what the products read.
template <class... R>
__device__ inline void wgmma_fence(R&... registers) {
  (keep_in_place(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` groups are unfinished. `registers` are the sums that may be read from here on.
template <int pending, class... R>
__device__ inline void wgmma_wait(R&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (keep_in_place(registers), ...);
}

// Makes this thread's ordinary writes to shared memory (cp.async among them) visible to wgmma and the accelerator; a
// barrier comes after it.
__device__ inline void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// d[64, kN] (+)= a[64, 16] b[kN, 16]^T, a and b through descriptors (layout.cuh), asynchronous. Element i of d belongs
// to row 16 warp + fragment_row(lane, i % 4), column 8 (i / 4) + fragment_column(lane, i % 4). Without `add` d is
// overwritten. kMnMajorA, kMnMajorB: the operand's rows (m, n) are adjacent in memory instead of k.
template <class T, int kN, bool kMnMajorA, bool kMnMajorB>
struct Wgmma;

// The same with a in registers: each warp's fragment of its 16 rows. They stay untouched until the wait.
template <class T, int kN, bool kMnMajorB>
struct WgmmaRegisters;

// "%0, %1, ..." in tens (t is empty or a digit or two), and as many operands in eights.
#define VIT_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define VIT_8(i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define VIT_32(i) VIT_8(i), VIT_8(i + 8), VIT_8(i + 16), VIT_8(i + 24)
#define VIT_FIFTY VIT_TEN() ", " VIT_TEN(1) ", " VIT_TEN(2) ", " VIT_TEN(3) ", " VIT_TEN(4)

// Lists for kN / 2 accumulators.
#define VIT_TEXT_16 VIT_TEN() ", %10, %11, %12, %13, %14, %15"
#define VIT_TEXT_32 VIT_TEN() ", " VIT_TEN(1) ", " VIT_TEN(2) ", %30, %31"
#define VIT_TEXT_40 VIT_TEN() ", " VIT_TEN(1) ", " VIT_TEN(2) ", " VIT_TEN(3)
#define VIT_TEXT_48 VIT_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VIT_TEXT_64 VIT_FIFTY ", " VIT_TEN(5) ", %60, %61, %62, %63"
#define VIT_TEXT_68 VIT_FIFTY ", " VIT_TEN(5) ", %60, %61, %62, %63, %64, %65, %66, %67"
#define VIT_TEXT_96 \
  VIT_FIFTY ", " VIT_TEN(5) ", " VIT_TEN(6) ", " VIT_TEN(7) ", " VIT_TEN(8) ", %90, %91, %92, %93, %94, %95"
#define VIT_TEXT_104 \
  VIT_FIFTY ", " VIT_TEN(5) ", " VIT_TEN(6) ", " VIT_TEN(7) ", " VIT_TEN(8) ", " VIT_TEN(9) ", %100, %101, %102, %103"
#define VIT_LIST_16 VIT_8(0), VIT_8(8)
#define VIT_LIST_32 VIT_32(0)
#define VIT_LIST_40 VIT_32(0), VIT_8(32)
#define VIT_LIST_48 VIT_32(0), VIT_8(32), VIT_8(40)
#define VIT_LIST_64 VIT_32(0), VIT_32(32)
#define VIT_LIST_68 VIT_32(0), VIT_32(32), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define VIT_LIST_96 VIT_32(0), VIT_32(32), VIT_32(64)
#define VIT_LIST_104 VIT_32(0), VIT_32(32), VIT_32(64), VIT_8(96)

// The numbers after H, half of N, are those of the operands behind the accumulators.
#define VIT_WGMMA(T, TYPE, N, H, A, B, ADD, TA, TB)                                                  \
  template <bool kMnMajorA, bool kMnMajorB>                                                          \
  struct Wgmma<T, N, kMnMajorA, kMnMajorB> {                                                         \
    __device__ static void issue(float (&d)[H], uint64_t a, uint64_t b, bool add) {                  \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD                                     \
                   ", 0;\n"                                                                          \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VIT_TEXT_##H \
                   "}, %" #A ", %" #B ", add, 1, 1, %" #TA ", %" #TB ";\n}"                          \
                   : VIT_LIST_##H                                                                    \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMnMajorA)),   \
                     "n"(static_cast<int>(kMnMajorB)));                                              \
    }                                                                                                \
  };
#define VIT_WGMMA_REGISTERS(T, TYPE, N, H, A0, A1, A2, A3, B, ADD, TB)                               \
  template <bool kMnMajorB>                                                                          \
  struct WgmmaRegisters<T, N, kMnMajorB> {                                                           \
    __device__ static void issue(float (&d)[H], const uint32_t (&a)[4], uint64_t b, bool add) {      \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD                                     \
                   ", 0;\n"                                                                          \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VIT_TEXT_##H \
                   "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, %" #TB ";\n}"   \
                   : VIT_LIST_##H                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                     "n"(static_cast<int>(kMnMajorB)));                                              \
    }                                                                                                \
  };
#define VIT_BOTH(MACRO, ...)       \
  MACRO(bf16, "bf16", __VA_ARGS__) \
  MACRO(f16, "f16", __VA_ARGS__)

// Products of matrices, and of attention: 64, 128, 208 and twice 136 keys, heads of 32 to 128; 32 columns in its
// backward.
VIT_BOTH(VIT_WGMMA, 32, 16, 16, 17, 18, 19, 20)
VIT_BOTH(VIT_WGMMA, 64, 32, 32, 33, 34, 35, 36)
VIT_BOTH(VIT_WGMMA, 128, 64, 64, 65, 66, 67, 68)
VIT_BOTH(VIT_WGMMA, 192, 96, 96, 97, 98, 99, 100)
VIT_BOTH(VIT_WGMMA_REGISTERS, 32, 16, 16, 17, 18, 19, 20, 21, 22)
VIT_BOTH(VIT_WGMMA_REGISTERS, 64, 32, 32, 33, 34, 35, 36, 37, 38)
VIT_BOTH(VIT_WGMMA_REGISTERS, 80, 40, 40, 41, 42, 43, 44, 45, 46)
VIT_BOTH(VIT_WGMMA_REGISTERS, 96, 48, 48, 49, 50, 51, 52, 53, 54)
VIT_BOTH(VIT_WGMMA_REGISTERS, 128, 64, 64, 65, 66, 67, 68, 69, 70)
VIT_BOTH(VIT_WGMMA_REGISTERS, 136, 68, 68, 69, 70, 71, 72, 73, 74)
VIT_BOTH(VIT_WGMMA_REGISTERS, 208, 104, 104, 105, 106, 107, 108, 109, 110)

#undef VIT_BOTH
#undef VIT_WGMMA_REGISTERS
#undef VIT_WGMMA
#undef VIT_LIST_104
#undef VIT_LIST_96
#undef VIT_LIST_68
#undef VIT_LIST_64
#undef VIT_LIST_48
#undef VIT_LIST_40
#undef VIT_LIST_32
#undef VIT_LIST_16
#undef VIT_TEXT_104
#undef VIT_TEXT_96
#undef VIT_TEXT_68
#undef VIT_TEXT_64
#undef VIT_TEXT_48
#undef VIT_TEXT_40
#undef VIT_TEXT_32
#undef VIT_TEXT_16
#undef VIT_FIFTY
#undef VIT_32
#undef VIT_8
#undef VIT_TEN

#endif  // VIT_CUDA_HOPPER

}  // namespace vit::cuda

#endif
