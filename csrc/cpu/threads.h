// Fork-join over the OpenMP threads the process already has (torch's own pool: a second pool beside it costs 4 ms per
// call, because torch's workers spin on the cores for a while after each of their regions).
#pragma once

#include <cstdint>
#include <string>

namespace vit {

// Calls body(data, thread, threads) once on each of at most `threads` threads and waits for them. Fewer run where the
// runtime grants fewer (inside another parallel region, in a forked child, without OpenMP). 1 never touches a pool.
void run_threads(int threads, void (*body)(void* data, int thread, int threads), void* data);

// A meeting point of threads inside one run_threads call. Waits spin for a few microseconds and then give up the core:
// with more threads than cores an unbounded spin makes everything 40 times slower.
struct Barrier {
  alignas(64) int32_t arrived = 0;
  alignas(64) int32_t round = 0;

  void wait(int members);
};

// Arguments of at least one thread: a workspace is asked for before the context is checked.
template <class P>
P with_a_thread(P p) {
  if (p.context.num_threads < 1) p.context.num_threads = 1;
  return p;
}

// Where the threads come from, in words for `vit info`.
std::string threads_runtime();

#ifdef VIT_ISA
namespace VIT_ISA {

// How many threads pay for so many multiply-adds. A region of two costs 1 to 2 us where the second one still spins
// and 50 us where it sleeps or its core is taken; one core of a Zen 5 does this many in 4 us.
inline int threads_for(int threads, int64_t products) { return products < (int64_t{1} << 19) ? 1 : threads; }

// Splits units [0, n) into one contiguous range per thread and calls f(begin, end, thread) on each; thread < threads
// indexes scratch memory. A unit's result must not depend on the range it falls into.
template <class F>
void parallel_for(int threads, int64_t n, const F& f) {
  if (n <= 0) return;
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) return f(int64_t{0}, n, 0);
  struct Job {
    const F& f;
    int64_t n;
  } job{f, n};
  run_threads(
      threads,
      [](void* data, int thread, int of) {
        const Job& job = *static_cast<const Job*>(data);
        const int64_t base = job.n / of, extra = job.n % of;
        const int64_t begin = base * thread + (thread < extra ? thread : extra);
        const int64_t end = begin + base + (thread < extra);
        if (begin < end) job.f(begin, end, thread);
      },
      &job);
}

}  // namespace VIT_ISA
#endif

}  // namespace vit
