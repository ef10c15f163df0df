// What every launcher shares: errors, the device of a call, and one function that launches a kernel and turns
// a CUDA error into a vit::Error that names the op and its shape.
#pragma once

#include <atomic>
#include <cstddef>
#include <initializer_list>
#include <string>

#include "check.h"
#include "instructions.cuh"
#include "vit.h"

namespace vit::cuda {

inline constexpr int kMaxDevices = 64;

[[noreturn]] void fail(const std::string& op, const std::string& what);

inline void require(bool ok, const char* op, const char* what) {
  if (!ok) fail(op, what);
}

inline std::size_t bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline bool is_16_bit(DType dtype) { return dtype == DType::bfloat16 || dtype == DType::float16; }

// Sizes of a workspace are rounded up so that the next part of it is aligned too.
inline std::size_t aligned(std::size_t n) { return (n + 255) / 256 * 256; }

inline bool is_aligned(const void* p, std::size_t to = 16) { return reinterpret_cast<std::uintptr_t>(p) % to == 0; }

// The device of a call is current while this lives; the one that was current before comes back after, if the process
// uses it: to make a device current gives it a context, which takes 530 MB of the memory of, say, device 0 in each of 8
// processes that work on the others. (So does PyTorch, whose allocation of the result has been here before.)
class DeviceGuard {
 public:
  DeviceGuard(const char* op, const Context& context);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Compute capability of a device, 10 * major + minor: 80, 90, ... Read once per device.
int capability(int device);

// Whether Hopper's own kernels run on a device: it is one, and this build has them.
bool has_hopper_kernels(int device);

// Multiprocessors of a device. Read once per device.
int multiprocessors(int device);

// Which kernels gemm and attention may use: `automatic` takes the fastest that the device and the sizes allow,
// `portable` those of any GPU and any length alone, `no_wgmma` what a GPU of 8.0 gets, those for short sequences among
// them, `no_overlap` the fastest, none of which begins before the launch in front of it has ended, `wgmma_backward` the
// fastest with attention_bwd_hopper.cu, which no GPU has timed. Set by the benchmark and the tests alone, to measure
// and to check all on one GPU: a property of the process, like a device mask.
enum class Path { automatic = 0, portable = 1, no_wgmma = 2, no_overlap = 3, wgmma_backward = 4 };
Path path();
void set_path(Path);

// Whether kernels of wgmma may run on a device now.
bool hopper_allowed(int device);

// The sizes of a call for error texts, put into words only when there is an error: "M=3 N=4".
struct Shape {
  struct Size {
    const char* name;
    int64_t value;
  };
  Size sizes[6] = {};

  Shape(std::initializer_list<Size> given) {
    Size* to = sizes;
    for (const Size& size : given) *to++ = size;
  }
  std::string text() const;
};

struct Launch {
  const char* op;
  Shape shape;
  const Context& context;
  int64_t blocks;
  int threads;
  std::size_t shared_bytes = 0;
  int cluster = 1;
  // The kernel may begin while the one in front of it ends: it waits for it by itself, before it touches device memory
  // (wait_on_dependent_grids). Only for kernels that are compiled for 9.0a alone: code of 8.0 has no such wait.
  bool overlaps = false;
};

// Throws for an error of the launch itself (configuration, missing kernel image). Faults while a kernel runs are
// reported by the next call that synchronises, as with every CUDA library.
void check_launch(cudaError_t, const Launch&);

// Shared memory a block of the device may have at most: 99 KiB (8.6, 8.9, 12.x), 163 KiB (8.0), 227 KiB (9.0, 10.x).
int shared_limit(int device);
// The least of them. A kernel that may need more is either one that something else can stand in for, and chosen by
// shared_limit, or in the table of attention.cu from which the backend knows what it must refuse.
inline constexpr int kLeastShared = 99 * 1024;

// What cudaLaunchKernelEx takes. `allowed` belongs to the kernel: a kernel that wants more than 48 KiB says so before,
// once per device.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  LaunchConfig(const Launch&, const void* kernel, std::atomic<bool> (&allowed)[kMaxDevices]);
  LaunchConfig(const LaunchConfig&) = delete;  // config points to attributes
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Runs kernel(args...) on the stream of the context.
template <auto kernel, class... Args>
void launch(const Launch& launch, Args... args) {
  static std::atomic<bool> allowed[kMaxDevices];
  if (launch.blocks <= 0) return;
  const LaunchConfig how(launch, reinterpret_cast<const void*>(kernel), allowed);
  check_launch(cudaLaunchKernelEx(&how.config, kernel, args...), launch);
}

// dispatch(dtype, f) calls f(T{}) with the element type; the second form has the 16-bit and float32 types alone.
template <class F>
void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(bf16{});
    case DType::float16:
      return f(f16{});
  }
}

template <class F>
void dispatch_16_bit(DType dtype, F f) {
  if (dtype == DType::bfloat16) return f(bf16{});
  return f(f16{});
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Instead of <algorithm>, which every one of 17 files would read three times: 3 s of the build.
template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace vit::cuda
