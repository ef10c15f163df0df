// Fibers: the threads of one block (or one cluster of blocks) take turns in a random order until all are done.
#include <algorithm>
#include <numeric>
#include <random>

#include "hopper_instructions.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace vit::emulator {
namespace {

constexpr std::size_t kStack = 256 * 1024;

thread_local void* scheduler_stack = nullptr;
thread_local const std::function<void()>* body = nullptr;
thread_local std::string error;
thread_local uint64_t steps = 0;
thread_local std::vector<std::function<void()>> accelerator;  // copies under way

#if defined(__x86_64__)
extern "C" void vit_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl vit_emulator_switch
.type vit_emulator_switch, @function
vit_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vit_emulator_switch, .-vit_emulator_switch
)");

void to_scheduler() { vit_emulator_switch(&current->stack_pointer, scheduler_stack); }
void to_thread(Thread& thread) { vit_emulator_switch(&scheduler_stack, thread.stack_pointer); }
#else
thread_local ucontext_t scheduler_context;
void to_scheduler() { swapcontext(static_cast<ucontext_t*>(current->stack_pointer), &scheduler_context); }
void to_thread(Thread& thread) { swapcontext(&scheduler_context, static_cast<ucontext_t*>(thread.stack_pointer)); }
#endif

void enter() {
  try {
    (*body)();
    if (!current->waited) stop("a thread ended without the wait for the grid in front");
  } catch (const std::exception& e) {
    error = e.what();
  }
  current->done = true;
  --current->block->alive;
  progress();
  for (;;) to_scheduler();
}

// What lies around the shared memory of a block: 0xff, and out of bounds for AddressSanitizer.
constexpr std::size_t kGuard = 1024;

void unguard([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
#endif
}

void fill_shared(Block& block) {
  unguard(block.memory.data(), block.memory.size());
  std::memset(block.memory.data(), 0xff, block.memory.size());
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block.shared + block.shared_bytes, kGuard);
  ASAN_POISON_MEMORY_REGION(block.shared - kGuard, kGuard);
#endif
}

void check_guards(Block& block) {
  unguard(block.memory.data(), block.memory.size());
  for (std::size_t i = 0; i < kGuard; ++i)
    if (block.shared[block.shared_bytes + i] != 0xff || block.shared[-1 - static_cast<int>(i)] != 0xff)
      throw std::runtime_error("cuda emulator: wrote beyond shared memory");
}

void prepare(Thread& thread) {
  thread.stack.resize(kStack);
  unguard(thread.stack.data(), kStack);  // the frames of a thread that has ended were never left
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(thread.stack.data() + kStack) & ~uintptr_t{63};
  auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, one word of alignment
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(&enter);
  thread.stack_pointer = frame;
#else
  static thread_local std::vector<ucontext_t> contexts(4096);
  static thread_local std::size_t next = 0;
  ucontext_t& context = contexts[next++ % contexts.size()];
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.data();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, enter, 0);
  thread.stack_pointer = &context;
#endif
}

void run_cluster(std::vector<Block>& blocks, std::mt19937& random) {
  std::vector<Thread*> ready;
  for (auto& block : blocks)
    for (auto& thread : block.threads) ready.push_back(&thread);
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), random);
    const uint64_t before = steps;
    for (auto* thread : ready) {
      current = thread;
      to_thread(*thread);
      if (!error.empty()) throw std::runtime_error("cuda emulator: " + error);
    }
    for (int i = static_cast<int>(random() % 4); i > 0 && !accelerator.empty(); --i) {
      std::swap(accelerator[random() % accelerator.size()], accelerator.back());
      const auto work = std::move(accelerator.back());
      accelerator.pop_back();
      work();
    }
    ready.erase(std::remove_if(ready.begin(), ready.end(), [](Thread* t) { return t->done; }), ready.end());
    if (steps == before && !ready.empty() && accelerator.empty()) throw std::runtime_error("cuda emulator: deadlock");
  }
}

}  // namespace

void yield() { to_scheduler(); }
void progress() { ++steps; }

void later(std::function<void()> work) { accelerator.push_back(std::move(work)); }

void stop(const std::string& why) { throw std::runtime_error(why); }

void block_barrier(int id, int threads) {
  Block* block = current->block;
  Meeting& meeting = block->barriers[id];
  const uint64_t generation = meeting.generation;
  ++meeting.arrived;
  progress();
  while (meeting.generation == generation) {
    if (meeting.arrived >= (threads ? threads : block->alive)) {
      meeting.arrived = 0;
      ++meeting.generation;
      progress();
      break;
    }
    yield();
  }
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  static std::mt19937 random(1);
  unsigned cluster = 1;
  bool overlaps = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = attribute.val.programmaticStreamSerializationAllowed;
  }
  if (config.gridDim.x % cluster) throw std::runtime_error("cuda emulator: grid is no multiple of the cluster");
  if (config.blockDim.x % 32) throw std::runtime_error("cuda emulator: blocks must be whole warps");
  body = &kernel;
  error.clear();
  accelerator.clear();
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<Block> blocks(cluster);
  for (auto& block : blocks) {
    block.threads.resize(config.blockDim.x);
    block.warps.resize(config.blockDim.x / 32);
    block.warpgroups.resize((config.blockDim.x + 127) / 128);
    block.memory.resize(config.dynamicSmemBytes + 2 * kGuard + 1024);
    block.shared = block.memory.data() + kGuard;
    block.shared += (1024 - reinterpret_cast<uintptr_t>(block.shared) % 1024) % 1024;
    block.shared_bytes = config.dynamicSmemBytes;
    block.size = config.blockDim;
  }
  for (unsigned first = 0; first < config.gridDim.x; first += cluster) {
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& block = blocks[rank];
      block.index.x = first + rank;
      block.rank = static_cast<int>(rank);
      block.cluster.clear();
      for (auto& other : blocks) block.cluster.push_back(&other);
      block.alive = static_cast<int>(config.blockDim.x);
      fill_shared(block);
      for (auto& barrier : block.barriers) barrier = {};
      for (unsigned i = 0; i < config.blockDim.x; ++i) {
        Thread& thread = block.threads[i];
        thread.index.x = i;
        thread.block = &block;
        thread.lane = static_cast<int>(i % 32);
        thread.warp = static_cast<int>(i / 32);
        thread.done = false;
        thread.unfenced = thread.registers_fenced = false;
        thread.waited = !overlaps;
        thread.open.clear();
        thread.groups.clear();
        thread.wgmma_open.clear();
        thread.wgmma_groups.clear();
        prepare(thread);
      }
    }
    run_cluster(blocks, random);
    for (auto& block : blocks) check_guards(block);
  }
  current = nullptr;
}

// The element (row, k) of an operand: its canonical place relative to the start address, then the swizzle on the
// address. PTX ISA, "Strides": core matrices are 8 rows of 16 bytes; without swizzle each is 128 bytes in a row, the
// leading distance lies between neighbours along k, the stride distance between neighbours along m or n.
static float operand_element(const Product& p, uint64_t descriptor, bool columns, int row, int k) {
  const bool swizzle = descriptor >> 62 == 1;
  if (!swizzle && descriptor >> 62 != 0) throw std::runtime_error("cuda emulator: a swizzle that is not emulated");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string("cuda emulator: a wgmma descriptor of ") + what);
  };
  if (swizzle) {  // base offset 0: the pattern begins at 1024 bytes. 16 further along k, or the next 64 of m or n
    require(start % 1024 < 128, "rows that do not begin with the pattern of the swizzle");
    require(stride % 1024 == 0 && (!columns || leading % 1024 == 0), "blocks that cut the pattern of the swizzle");
  } else {  // the ISA wants 16; whether a core matrix may cross a line of 128 bytes no source says
    require((start | leading | stride) % 128 == 0, "core matrices that are not aligned to 128 bytes");
  }
  uint32_t address = start;
  if (!swizzle)
    address += row / 8 * stride + k / 8 * leading + (columns ? k % 8 * 16 + row % 8 * 2 : row % 8 * 16 + k % 8 * 2);
  else if (columns)
    address += row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128;
  else
    address += row / 8 * stride + row % 8 * 128 + k * 2;
  if (swizzle) address ^= (address >> 7 & 7) << 4;
  if (address + 2 > p.block->shared_bytes) throw std::runtime_error("cuda emulator: wgmma reads beyond shared memory");
  uint16_t bits;
  std::memcpy(&bits, p.block->shared + address, 2);
  return p.element(bits);
}

// Element (m, k) of an operand in registers. PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": matrix A.
static float register_element(const Product& p, int m, int k) {
  const uint32_t word = p.a_registers[m / 16 * 32 + m % 8 * 4 + k % 8 / 2][k / 8 * 2 + m % 16 / 8];
  return p.element(static_cast<uint16_t>(word >> (16 * (k % 2))));
}

void Product::run() const {
  std::vector<float> A(64 * 16), B(static_cast<std::size_t>(n) * 16);
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 64; ++m)
      A[m * 16 + k] = a_registers[0] ? register_element(*this, m, k) : operand_element(*this, a, mn_major_a, m, k);
    for (int i = 0; i < n; ++i) B[i * 16 + k] = operand_element(*this, b, mn_major_b, i, k);
  }
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < n / 2; ++i) {  // PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": matrix D
      const int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 >= 2 ? 8 : 0);
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += A[row * 16 + k] * B[column * 16 + k];
      d[thread][i] = (add ? d[thread][i] : 0) + sum;
    }
}

}  // namespace vit::emulator

// For the tests, with ctypes: makes device 0 current, where the devices of the bits `used` alone have a context; the
// current device; which have a context, as bits; the error that the next call of the runtime would find.
extern "C" {
__attribute__((visibility("default"))) void vit_emulator_reset(int used) {
  for (int i = 0; i < kEmulatedDevices; ++i) emulated_contexts[i] = used >> i & 1;
  emulated_device = 0;
}
__attribute__((visibility("default"))) int vit_emulator_device() { return emulated_device; }
__attribute__((visibility("default"))) int vit_emulator_contexts() {
  int bits = 0;
  for (int i = 0; i < kEmulatedDevices; ++i) bits |= emulated_contexts[i] << i;
  return bits;
}
__attribute__((visibility("default"))) int vit_emulator_error() { return emulated_error; }

// A capture: begins (1) or ends (0); the names of the calls it refused; how many launches are kept, of all captures;
// runs some of them, and says what is wrong, null when nothing is.
__attribute__((visibility("default"))) void vit_emulator_capture(int on) {
  emulated_capture.on = on;
  if (on) emulated_capture.refused.clear();
}
__attribute__((visibility("default"))) const char* vit_emulator_refused() { return emulated_capture.refused.c_str(); }
__attribute__((visibility("default"))) int vit_emulator_kept() {
  return static_cast<int>(emulated_capture.launches.size());
}
__attribute__((visibility("default"))) const char* vit_emulator_replay(int first, int last) {
  static std::string text;
  try {
    for (int i = first; i < last; ++i) emulated_capture.launches[i]();
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
  return nullptr;
}
}

namespace vit::cuda {

// The first thread of a warpgroup keeps the list of its products.
static emulator::Thread& leader() {
  auto* me = emulator::current;
  return me->block->threads[me->index.x / 128 * 128];
}

void wgmma_issue(const emulator::Product& product) {
  auto mine = product;
  auto& first = leader();
  emulator::meet_warpgroup(&mine, [&](void** slots) {
    for (const auto& thread : product.block->threads)
      if (thread.unfenced) emulator::stop("wgmma after copies to shared memory without a fence between the proxies");
    if (!first.registers_fenced) emulator::stop("wgmma without wgmma.fence since its registers could be written");
    emulator::Product all = product;
    for (int i = 0; i < 128; ++i) {
      const auto& other = *static_cast<emulator::Product*>(slots[i]);
      if (other.a != all.a || other.b != all.b) emulator::stop("descriptors differ within a warpgroup");
      all.d[i] = other.d[0];
      all.a_registers[i] = other.a_registers[0];
    }
    first.wgmma_open.push_back([all] { all.run(); });
  });
}

void wgmma_commit() {
  auto& first = leader();
  emulator::meet_warpgroup(nullptr, [&](void**) {
    first.wgmma_groups.push_back(std::move(first.wgmma_open));
    first.wgmma_open.clear();
  });
}

void wgmma_wait_for(std::size_t pending) {
  auto& first = leader();
  emulator::meet_warpgroup(nullptr, [&](void**) {
    while (first.wgmma_groups.size() > pending) {
      for (const auto& product : first.wgmma_groups.front()) product();
      first.wgmma_groups.erase(first.wgmma_groups.begin());
    }
  });
}

}  // namespace vit::cuda
