// Fibers: the threads of one block (or one cluster of blocks) take turns in a random order until all are done.
#include <algorithm>
#include <numeric>
#include <random>

#include "instructions.cuh"

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
void to_scheduler() {
  swapcontext(static_cast<ucontext_t*>(current->stack_pointer), &scheduler_context);
}
void to_thread(Thread& thread) { swapcontext(&scheduler_context, static_cast<ucontext_t*>(thread.stack_pointer)); }
#endif

void enter() {
  try {
    (*body)();
  } catch (const std::exception& e) {
    error = e.what();
  }
  current->done = true;
  --current->block->alive;
  progress();
  for (;;) to_scheduler();
}

void prepare(Thread& thread) {
  thread.stack.resize(kStack);
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
    ready.erase(std::remove_if(ready.begin(), ready.end(), [](Thread* t) { return t->done; }), ready.end());
    if (steps == before && !ready.empty()) throw std::runtime_error("cuda emulator: deadlock");
  }
}

}  // namespace

void yield() { to_scheduler(); }
void progress() { ++steps; }

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
  const unsigned cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  if (config.gridDim.x % cluster) throw std::runtime_error("cuda emulator: grid is no multiple of the cluster");
  if (config.blockDim.x % 32) throw std::runtime_error("cuda emulator: blocks must be whole warps");
  body = &kernel;
  error.clear();
  gridDim = config.gridDim;
  std::vector<Block> blocks(cluster);
  for (auto& block : blocks) {
    block.threads.resize(config.blockDim.x);
    block.warps.resize(config.blockDim.x / 32);
    block.warpgroups.resize((config.blockDim.x + 127) / 128);
    block.memory.resize(config.dynamicSmemBytes + 2048);
    block.shared = block.memory.data() + (1024 - reinterpret_cast<uintptr_t>(block.memory.data()) % 1024);
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
      std::memset(block.memory.data(), 0xff, block.memory.size());
      for (auto& barrier : block.barriers) barrier = {};
      for (unsigned i = 0; i < config.blockDim.x; ++i) {
        Thread& thread = block.threads[i];
        thread.index.x = i;
        thread.block = &block;
        thread.lane = static_cast<int>(i % 32);
        thread.warp = static_cast<int>(i / 32);
        thread.done = false;
        thread.open.clear();
        thread.groups.clear();
        prepare(thread);
      }
    }
    run_cluster(blocks, random);
    for (auto& block : blocks) {
      const auto* end = block.shared + block.shared_bytes;
      for (int i = 0; i < 256; ++i)
        if (end[i] != 0xff) throw std::runtime_error("cuda emulator: wrote beyond shared memory");
    }
  }
  current = nullptr;
}

}  // namespace vit::emulator
