// Takes the place of csrc/cuda/hopper_instructions.cuh in the emulator. Copies of the tensor memory accelerator happen
// at a random later time, products of wgmma no earlier than the wait for them, and shared memory is read through the
// descriptors as the PTX ISA defines them.
#ifndef VIT_CUDA_HOPPER_INSTRUCTIONS
#define VIT_CUDA_HOPPER_INSTRUCTIONS

#include <memory>

#include "instructions.cuh"

#define VIT_CUDA_HOPPER

namespace vit::emulator {

// An mbarrier in its 8 bytes: arrivals still missing in this phase, arrivals per phase, bytes announced less bytes
// come, parity of the phase in progress.
struct Barrier {
  uint64_t missing : 12;
  uint64_t arrivals : 12;
  int64_t bytes : 32;
  uint64_t parity : 8;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_at(Block* block, std::size_t offset) {
  return *reinterpret_cast<Barrier*>(block->shared + offset);
}

inline void complete_phase(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.parity ^= 1;
  progress();
}

void later(std::function<void()> work);  // by the accelerator: at a random time, in a random order

// One product of a warpgroup, waiting for wgmma_commit and then for wgmma_wait.
struct Product {
  float* d[128];
  const uint32_t* a_registers[128];  // or null: a through its descriptor
  Block* block;
  uint64_t a, b;
  bool add, mn_major_a, mn_major_b;
  int n;
  float (*element)(uint16_t);
  void run() const;
};

template <class F>
void meet_warpgroup(void* slot, F work) {
  Thread* me = current;
  meet(me->block->warpgroups[me->warp / 4], 128, static_cast<int>(me->index.x % 128), slot, work);
}

}  // namespace vit::emulator

namespace vit::cuda {

struct TensorMap {
  const unsigned char* data;
  uint64_t dims[3], strides[2];
  uint32_t box[2];
};

inline bool encode_tensor_map(TensorMap& map, const void* data, bool, const uint64_t (&dims)[3],
                              const uint64_t (&strides)[2], uint32_t box0, uint32_t box1) {
  // what the driver checks
  if (reinterpret_cast<uintptr_t>(data) % 16 || strides[0] % 16 || strides[1] % 16 || box0 * 2 > 128 || box1 > 256)
    return false;
  for (const uint64_t n : dims)
    if (n == 0 || n > (uint64_t{1} << 32)) return false;
  map = {static_cast<const unsigned char*>(data), {dims[0], dims[1], dims[2]}, {strides[0], strides[1]}, {box0, box1}};
  return true;
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  check_shared(barrier, 8, 8);
  auto& b = emulator::barrier_at(emulator::current->block, shared_address(barrier));
  b = {};
  b.missing = b.arrivals = arrivals;
}
inline void barrier_init_fence() {}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  check_shared(barrier, 8, 8);
  auto& b = emulator::barrier_at(emulator::current->block, shared_address(barrier));
  if (b.missing == 0) emulator::stop("too many arrivals at a barrier that counts bytes");
  b.bytes += bytes;
  b.missing -= 1;
  emulator::complete_phase(b);
  emulator::progress();
}

inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  check_shared(barrier, 8, 8);
  auto* block = emulator::current->block;
  if (rank >= block->cluster.size()) emulator::stop("no such block in the cluster");
  if (block->cluster[rank]->alive == 0) emulator::stop("arrival at a block that has ended");
  auto& b = emulator::barrier_at(block->cluster[rank], shared_address(barrier));
  if (b.missing == 0) emulator::stop("too many arrivals at a barrier");
  b.missing -= 1;
  emulator::complete_phase(b);
  emulator::progress();
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  check_shared(barrier, 8, 8);
  auto& b = emulator::barrier_at(emulator::current->block, shared_address(barrier));
  while (b.parity == (parity & 1)) emulator::yield();
}

inline void prefetch_tensor_map(const TensorMap*) {}

inline void wait_on_dependent_grids() { emulator::current->waited = true; }
inline void launch_dependent_grids() {
  if (!emulator::current->waited) emulator::stop("the next grid may begin before this one has waited");
}

inline void tensor_load_multicast(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                  uint16_t mask) {
  const uint32_t bytes = map->box[0] * map->box[1] * 2;
  check_shared(to, bytes, 1024);
  emulator::check_waited();
  check_shared(barrier, 8, 8);
  auto* me = emulator::current->block;
  const uint32_t offset = shared_address(to), at = shared_address(barrier);
  const TensorMap m = *map;
  for (std::size_t rank = 0; rank < me->cluster.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    auto* block = me->cluster[rank];
    emulator::later([=] {
      for (uint32_t row = 0; row < m.box[1]; ++row)
        for (uint32_t i = 0; i < m.box[0]; ++i) {
          const int64_t x = int64_t{c0} + i, y = int64_t{c1} + row;
          uint16_t value = 0;
          if (x >= 0 && y >= 0 && static_cast<uint64_t>(x) < m.dims[0] && static_cast<uint64_t>(y) < m.dims[1] &&
              static_cast<uint64_t>(c2) < m.dims[2])
            std::memcpy(&value, m.data + x * 2 + y * m.strides[0] + c2 * m.strides[1], 2);
          const uint32_t linear = row * m.box[0] * 2 + i * 2;
          std::memcpy(block->shared + offset + (linear ^ (linear >> 7 & 7) << 4), &value, 2);
        }
      auto& b = emulator::barrier_at(block, at);
      b.bytes -= bytes;
      emulator::complete_phase(b);
    });
  }
}

inline void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  tensor_load_multicast(to, map, barrier, c0, c1, c2, static_cast<uint16_t>(1 << emulator::current->block->rank));
}

inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulator::current->block->rank); }

inline void cluster_barrier() {
  auto* first = emulator::current->block->cluster[0];
  auto& meeting = first->barriers[15];
  const uint64_t generation = meeting.generation;
  const int all = static_cast<int>(first->cluster.size() * first->threads.size());
  if (++meeting.arrived == all) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  emulator::progress();
  while (meeting.generation == generation) emulator::yield();
}

inline void named_barrier_wait(int id, int threads) { emulator::block_barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) {
  auto& meeting = emulator::current->block->barriers[id];
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  emulator::progress();
}

template <int registers>
void warpgroup_reg_dealloc() {}
template <int registers>
void warpgroup_reg_alloc() {}

inline void fence_for_wgmma() { emulator::current->unfenced = false; }

template <class... R>
void wgmma_fence(R&...) {
  emulator::meet_warpgroup(nullptr, [](void**) {});
  emulator::current->registers_fenced = true;
}
void wgmma_issue(const emulator::Product& product);
void wgmma_commit();
void wgmma_wait_for(std::size_t pending);
template <int pending, class... R>
void wgmma_wait(R&...) {
  wgmma_wait_for(pending);
  emulator::current->registers_fenced = false;  // from here on the program may touch them
}

template <class T, int kN, bool kMnMajorB>
emulator::Product wgmma_product(float (&d)[kN / 2], uint64_t b, bool add) {
  emulator::Product product = {};
  product.d[0] = d;
  product.block = emulator::current->block;
  product.b = b;
  product.add = add;
  product.mn_major_b = kMnMajorB;
  product.n = kN;
  product.element = [](uint16_t bits) { return half_of<T>(bits, 0); };
  return product;
}

template <class T, int kN, bool kMnMajorA, bool kMnMajorB>
struct Wgmma {
  static void issue(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
    emulator::Product product = wgmma_product<T, kN, kMnMajorB>(d, b, add);
    product.a = a;
    product.mn_major_a = kMnMajorA;
    wgmma_issue(product);
  }
};

template <class T, int kN, bool kMnMajorB>
struct WgmmaRegisters {
  static void issue(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    emulator::Product product = wgmma_product<T, kN, kMnMajorB>(d, b, add);
    product.a_registers[0] = a;
    wgmma_issue(product);
  }
};

}  // namespace vit::cuda

#endif
