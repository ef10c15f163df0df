// Instructions of Hopper (compute capability 9.0a): barriers in shared memory, the tensor memory accelerator, wgmma.
// VIT_CUDA_HOPPER is defined where they exist; kernels that use them are empty elsewhere and are never launched there.
// The emulator of the tests replaces this file, as it does instructions.cuh.
#ifndef VIT_CUDA_HOPPER_INSTRUCTIONS
#define VIT_CUDA_HOPPER_INSTRUCTIONS

#include <cuda.h>
#include <cuda_runtime.h>

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
  static const Encode encode = [] {  // through the runtime: the module does not link to the driver
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) !=
        cudaSuccess)
      function = nullptr;
    return reinterpret_cast<Encode>(function);
  }();
  const uint32_t box[3] = {box0, box1, 1}, steps[3] = {1, 1, 1};
  return encode && encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                          const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#ifdef VIT_CUDA_HOPPER

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

// Arrives at the barrier of the same place in block `rank` of the cluster.
__device__ inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
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
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
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
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// d[64, kN] (+)= a[64, 16] b[kN, 16]^T, a and b through descriptors (layout.cuh), asynchronous. Element i of d belongs
// to row 16 warp + fragment_row(lane, i % 4), column 8 (i / 4) + fragment_column(lane, i % 4). Without `add` d is
// overwritten. kColumnsA, kColumnsB: the operand's rows (m, n) are adjacent in memory instead of k.
template <class T, int kN, bool kColumnsA, bool kColumnsB>
struct Wgmma;

#define VIT_FLOATS_8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

#define VIT_WGMMA(T, TYPE, N, A, B, ADD, TA, TB, REGISTERS, ...)                                                 \
  template <bool kColumnsA, bool kColumnsB>                                                                      \
  struct Wgmma<T, N, kColumnsA, kColumnsB> {                                                                     \
    __device__ static void issue(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {                          \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                   \
                   ", 0;\n"                                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
                   ", add, 1, 1, " TA ", " TB ";\n}"                                                             \
                   : __VA_ARGS__                                                                                 \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kColumnsA)),               \
                     "n"(static_cast<int>(kColumnsB)));                                                          \
    }                                                                                                            \
  };

#define VIT_REGISTERS_32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VIT_OPERANDS_32 VIT_FLOATS_8(0), VIT_FLOATS_8(8), VIT_FLOATS_8(16), VIT_FLOATS_8(24)
VIT_WGMMA(bf16, "bf16", 64, "%32", "%33", "%34", "%35", "%36", VIT_REGISTERS_32, VIT_OPERANDS_32)
VIT_WGMMA(f16, "f16", 64, "%32", "%33", "%34", "%35", "%36", VIT_REGISTERS_32, VIT_OPERANDS_32)
#undef VIT_REGISTERS_32
#undef VIT_OPERANDS_32

#define VIT_REGISTERS_64                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VIT_OPERANDS_64                                                                                     \
  VIT_FLOATS_8(0), VIT_FLOATS_8(8), VIT_FLOATS_8(16), VIT_FLOATS_8(24), VIT_FLOATS_8(32), VIT_FLOATS_8(40), \
      VIT_FLOATS_8(48), VIT_FLOATS_8(56)
VIT_WGMMA(bf16, "bf16", 128, "%64", "%65", "%66", "%67", "%68", VIT_REGISTERS_64, VIT_OPERANDS_64)
VIT_WGMMA(f16, "f16", 128, "%64", "%65", "%66", "%67", "%68", VIT_REGISTERS_64, VIT_OPERANDS_64)
#undef VIT_REGISTERS_64
#undef VIT_OPERANDS_64

#define VIT_REGISTERS_96                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VIT_OPERANDS_96                                                                                     \
  VIT_FLOATS_8(0), VIT_FLOATS_8(8), VIT_FLOATS_8(16), VIT_FLOATS_8(24), VIT_FLOATS_8(32), VIT_FLOATS_8(40), \
      VIT_FLOATS_8(48), VIT_FLOATS_8(56), VIT_FLOATS_8(64), VIT_FLOATS_8(72), VIT_FLOATS_8(80), VIT_FLOATS_8(88)
VIT_WGMMA(bf16, "bf16", 192, "%96", "%97", "%98", "%99", "%100", VIT_REGISTERS_96, VIT_OPERANDS_96)
VIT_WGMMA(f16, "f16", 192, "%96", "%97", "%98", "%99", "%100", VIT_REGISTERS_96, VIT_OPERANDS_96)
#undef VIT_REGISTERS_96
#undef VIT_OPERANDS_96

#undef VIT_WGMMA
#undef VIT_FLOATS_8

#endif  // VIT_CUDA_HOPPER

}  // namespace vit::cuda

#endif
