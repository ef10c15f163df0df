#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace vit {
namespace {

// GCC's OpenMP entry point, also exported by LLVM's and Intel's runtimes. Calling it through a pointer instead of
// linking with -fopenmp joins whichever runtime the process has, in any wheel of torch and without torch.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using Query = int (*)();

struct Runtime {
  Parallel parallel = nullptr;
  Query thread_num = nullptr;
  Query num_threads = nullptr;
  std::string text;
};

std::atomic<bool> pooled{false};  // a region of several threads was opened
std::atomic<bool> forked{false};  // this process is a child of one that had opened one

bool resolve(void* library, Runtime& runtime) {
  runtime.parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  runtime.thread_num = reinterpret_cast<Query>(dlsym(library, "omp_get_thread_num"));
  runtime.num_threads = reinterpret_cast<Query>(dlsym(library, "omp_get_num_threads"));
  return runtime.parallel && runtime.thread_num && runtime.num_threads;
}

std::string library_of(Parallel function) {
  Dl_info found{};
  return dladdr(reinterpret_cast<void*>(function), &found) && found.dli_fname ? found.dli_fname : "unknown library";
}

Runtime find_runtime() {
  Runtime runtime;
  // An OpenMP pool does not survive fork(): a region in the child would wait for threads that are not there.
  pthread_atfork(nullptr, nullptr, [] { forked = forked || pooled; });
  if (resolve(RTLD_DEFAULT, runtime)) {
    runtime.text = "OpenMP of the process (" + library_of(runtime.parallel) + ")";
    return runtime;
  }
  void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library && resolve(library, runtime)) {
    runtime.text = "OpenMP loaded by vit (" + library_of(runtime.parallel) + ")";
    return runtime;
  }
  return {nullptr, nullptr, nullptr, "one thread: no OpenMP runtime in the process and no libgomp.so.1 to load"};
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Call {
  void (*body)(void*, int, int);
  void* data;
};

}  // namespace

void run_threads(int threads, void (*body)(void*, int, int), void* data) {
  if (threads <= 1 || !runtime().parallel || forked) return body(data, 0, 1);
  if (!pooled.load(std::memory_order_relaxed)) pooled = true;
  Call call{body, data};
  runtime().parallel(
      [](void* argument) {
        const Call& call = *static_cast<const Call*>(argument);
        call.body(call.data, runtime().thread_num(), runtime().num_threads());
      },
      &call, static_cast<unsigned>(threads), 0);
}

void Barrier::wait(int members) {
  if (members <= 1) return;
  const int32_t now = __atomic_load_n(&round, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
    __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
    return;
  }
  constexpr int kSpins = 2000;  // about 20 us
  for (int spin = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++spin)
    if (spin < kSpins)
      relax();
    else
      sched_yield();
}

std::string threads_runtime() {
  return forked ? "one thread: forked child of a process that used OpenMP's threads" : runtime().text;
}

}  // namespace vit
