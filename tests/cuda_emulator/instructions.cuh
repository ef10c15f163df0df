// Takes the place of csrc/cuda/instructions.cuh (same include guard): every CUDA kernel then compiles with a C++
// compiler and runs on the CPU, each thread of a block as a fiber. It is built to find mistakes, not to be fast:
// - threads of a block run in a random order between synchronisations;
// - asynchronous copies happen no earlier than the wait that makes them visible;
// - shared memory starts as NaN, and a block that can make no progress is an error, not a hang;
// - tensor core instructions follow the PTX ISA's tables, written here without a look at layout.cuh.
#ifndef VIT_CUDA_INSTRUCTIONS
#define VIT_CUDA_INSTRUCTIONS

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() ::vit::emulator::block_barrier(0, 0)
#define __syncwarp() ::vit::emulator::warp_barrier()
#define threadIdx (::vit::emulator::current->index)
#define blockIdx (::vit::emulator::current->block->index)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};
inline thread_local dim3 gridDim, blockDim;

// ---- the part of the CUDA runtime that csrc/cuda and benchmarks/gpu/probe.cu use ----
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDevice = 101,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed = 0;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  std::size_t totalGlobalMem;
};
#define CUDART_VERSION 13000
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaErrorInvalidDevice  ? "invalid device ordinal"
                                            : "invalid argument";
}

// Four GPUs: two Hopper of three multiprocessors, one of 8.6, and one with less shared memory than any that exists. A
// device has a context, and so memory of it is gone, from when it was made current on.
inline constexpr int kEmulatedDevices = 4;
inline thread_local int emulated_device = 0;
inline bool emulated_contexts[kEmulatedDevices];
inline thread_local cudaError_t emulated_error = cudaSuccess;               // of a call, until it is asked for
inline std::map<std::pair<int, const void*>, std::size_t> emulated_limits;  // of a kernel on a device
inline cudaError_t emulated_failure(cudaError_t error) { return emulated_error = error; }

// A stream capture, which a test begins and ends: launches are kept with copies of their parameters, and not run. What
// asks the runtime for anything else fails and is kept by name: it would end a capture (memory, synchronisation), or
// has an answer that does not change and should have been known (attributes), since a GPU's capture is made after a
// call that warmed up.
struct EmulatedCapture {
  bool on = false;
  std::string refused;
  std::vector<std::function<void()>> launches;  // of all captures
};
inline EmulatedCapture emulated_capture;
inline bool refused_in_capture(const char* what) {
  if (emulated_capture.on) emulated_capture.refused += std::string(emulated_capture.refused.empty() ? "" : " ") + what;
  return emulated_capture.on;
}
#define VIT_REFUSED_IN_CAPTURE \
  if (refused_in_capture(__func__)) return emulated_failure(cudaErrorStreamCaptureUnsupported)

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated_error;
  emulated_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = emulated_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kEmulatedDevices) return emulated_failure(cudaErrorInvalidDevice);
  if (!emulated_contexts[device]) VIT_REFUSED_IN_CAPTURE;
  emulated_contexts[device] = true;
  return emulated_device = device, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  VIT_REFUSED_IN_CAPTURE;
  return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  VIT_REFUSED_IN_CAPTURE;
  return *count = 0, cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return emulated_failure(cudaErrorInvalidValue); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  VIT_REFUSED_IN_CAPTURE;
  const int shared[kEmulatedDevices] = {227, 227, 99, 48};
  if (device < 0 || device >= kEmulatedDevices) return emulated_failure(cudaErrorInvalidDevice);
  *value = 0;
  if (which == cudaDevAttrComputeCapabilityMajor) *value = device < 2 ? 9 : 8;
  if (which == cudaDevAttrComputeCapabilityMinor) *value = device < 2 ? 0 : 6;
  if (which == cudaDevAttrMultiProcessorCount) *value = 3;
  if (which == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = shared[device] * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  VIT_REFUSED_IN_CAPTURE;
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, emulated_device);
  if (bytes > most) return emulated_failure(cudaErrorInvalidValue);
  emulated_limits[{emulated_device, kernel}] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int maxThreadsPerBlock = 1024;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  VIT_REFUSED_IN_CAPTURE;
  return *attributes = {}, cudaSuccess;
}

inline int emulated_context_state(int device, unsigned* flags, int* active) {  // cuDevicePrimaryCtxGetState
  return *flags = 0, *active = emulated_contexts[device], 0;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
inline constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  VIT_REFUSED_IN_CAPTURE;
  const bool known = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = known ? reinterpret_cast<void*>(&emulated_context_state) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <class T>
cudaError_t cudaMalloc(T** data, std::size_t bytes) {
  VIT_REFUSED_IN_CAPTURE;
  *data = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline void cudaFree(void* data) { std::free(data); }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  VIT_REFUSED_IN_CAPTURE;
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  VIT_REFUSED_IN_CAPTURE;
  return cudaSuccess;
}

namespace vit::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Block;

struct Thread {
  Index index;
  Block* block = nullptr;
  int lane = 0, warp = 0;
  bool done = false;
  bool unfenced = false;                  // has copied to shared memory what the tensor cores may not see yet
  bool registers_fenced = false;          // wgmma may take registers as they are
  bool waited = true;                     // for the grids in front of this one
  std::vector<Copy> open;                 // cp.async not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  std::vector<std::function<void()>> wgmma_open;
  std::vector<std::vector<std::function<void()>>> wgmma_groups;
  void* stack_pointer = nullptr;
  std::vector<unsigned char> stack;
};

// Threads that meet: the last to arrive does the work for all.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
  void* slots[128] = {};
};

struct Block {
  Index index;
  dim3 size;
  int rank = 0;  // in its cluster
  std::vector<Block*> cluster;
  std::vector<unsigned char> memory;  // shared memory, with room to align
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Meeting> warps, warpgroups;
  Meeting barriers[16];
  int alive = 0;
};

inline thread_local Thread* current = nullptr;

void yield();
void progress();
[[noreturn]] void stop(const std::string& why);

// Copies from device memory; loads and stores of plain C++ cannot be seen.
inline void check_waited() {
  if (!current->waited) stop("device memory before the wait for the grid in front");
}

// Every thread of `meeting` (of `count`) comes with its own `slot`; the last one calls work(slots).
template <class F>
void meet(Meeting& meeting, int count, int place, void* slot, F work) {
  meeting.slots[place] = slot;
  if (++meeting.arrived == count) {
    work(meeting.slots);
    meeting.arrived = 0;
    ++meeting.generation;
    progress();
    return;
  }
  const uint64_t generation = meeting.generation;
  while (meeting.generation == generation) yield();
}

template <class F>
void meet_warp(void* slot, F work) {
  Thread* me = current;
  meet(me->block->warps[me->warp], 32, me->lane, slot, work);
}

inline void warp_barrier() {
  meet_warp(nullptr, [](void**) {});
}

// bar.sync id, threads; threads = 0 is all that still live.
void block_barrier(int id, int threads);

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

template <class T>
T value_of(void* slot) {
  return *static_cast<T*>(slot);
}

}  // namespace vit::emulator

// A stream whose launches fail, as they do when the device has no memory left for the code of a kernel.
inline const cudaStream_t kFailingStream = reinterpret_cast<cudaStream_t>(1);

template <class Kernel, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, Args... args) {
  if (emulated_error != cudaSuccess) vit::emulator::stop("an error was left for the next call to find");
  emulated_contexts[emulated_device] = true;
  if (config->stream == kFailingStream) return emulated_error = cudaErrorMemoryAllocation;
  const auto limit = emulated_limits.find({emulated_device, reinterpret_cast<const void*>(kernel)});
  if (config->dynamicSmemBytes > (limit == emulated_limits.end() ? 48 * 1024 : limit->second))
    return emulated_error = cudaErrorInvalidValue;
  if (!emulated_capture.on) {
    vit::emulator::run(*config, [&] { kernel(args...); });
    return cudaSuccess;
  }
  std::vector<cudaLaunchAttribute> attributes(config->attrs, config->attrs + config->numAttrs);
  emulated_capture.launches.push_back([how = *config, attributes, kernel, args...]() mutable {
    how.attrs = attributes.data();
    vit::emulator::run(how, [&] { kernel(args...); });
  });
  return cudaSuccess;
}

namespace vit::cuda {

using std::erfc;
using std::exp;
using std::sqrt;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bf16_to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline bf16 float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float f16_to_float(f16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}
inline f16 float_to_f16(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  f16 z;
  std::memcpy(&z, &y, 2);
  return z;
}

// PTX ISA, alternate floating point formats: a sign, 4 bits of exponent with bias 7, 3 of fraction, all ones is NaN.
inline float e4m3_to_float(e4m3 x) {
  static const std::vector<float> table = [] {
    std::vector<float> all;
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, fraction = code & 7;
      const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
      all.push_back((code & 0x7f) == 0x7f ? NAN : code & 0x80 ? -size : size);
    }
    return all;
  }();
  return table[x.bits];
}
// cvt.rn.satfinite.e4m3x2.f32: of two neighbours the nearer one, of halves the even one.
inline e4m3 float_to_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return {0x7f};
  uint8_t low = 0;
  for (int step = 64; step > 0; step /= 2)
    if (low + step <= 0x7e && e4m3_to_float({static_cast<uint8_t>(low + step)}) <= std::fabs(x)) low += step;
  if (low == 0x7e) return {static_cast<uint8_t>(sign | low)};
  const double below = std::fabs(x) - e4m3_to_float({low});
  const double above = e4m3_to_float({static_cast<uint8_t>(low + 1)}) - std::fabs(x);
  return {static_cast<uint8_t>(sign | (low + (above < below || (above == below && low % 2))))};
}
inline uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low).bits | static_cast<uint32_t>(float_to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return float_to_f16(low).bits | static_cast<uint32_t>(float_to_f16(high).bits) << 16;
}

inline uint32_t __float_as_uint(float x) { return float_to_bits(x); }
inline float __uint_as_float(uint32_t x) { return bits_to_float(x); }
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(float_to_bits(x)); }
inline float __int_as_float(int32_t x) { return bits_to_float(static_cast<uint32_t>(x)); }

inline float rounded_product(float a, float b) { return a * b; }  // compiled without contraction
inline double rounded_product(double a, double b) { return a * b; }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline unsigned char* shared_memory() { return emulator::current->block->shared; }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::current->block->shared);
}

// A shared access of `bytes` must lie in the shared memory the launch asked for.
inline void check_shared(const void* p, std::size_t bytes, std::size_t alignment) {
  const auto* block = emulator::current->block;
  const std::size_t at = static_cast<const unsigned char*>(p) - block->shared;
  if (at + bytes > block->shared_bytes) emulator::stop("shared access out of bounds");
  if (at % alignment) emulator::stop("misaligned shared access");
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  check_shared(shared, 16, 16);
  emulator::check_waited();
  if (bytes < 0 || bytes > 16) emulator::stop("cp.async of a wrong size");
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::stop("cp.async from a misaligned address");
  emulator::current->open.push_back({shared, global, bytes});
}
inline void copy_async_commit() {
  auto* me = emulator::current;
  me->groups.push_back(std::move(me->open));
  me->open.clear();
}
template <int pending>
inline void copy_async_wait() {
  auto& groups = emulator::current->groups;
  while (groups.size() > static_cast<std::size_t>(pending)) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
      emulator::current->unfenced = true;
    }
    groups.erase(groups.begin());
  }
}

struct MatrixLoad {
  const void* row;
  uint32_t* r;
  bool transposed;
};

inline void load_matrices_slots(void** slots) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(element[r], emulator::value_of<MatrixLoad>(slots[8 * matrix + r]).row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const auto load = emulator::value_of<MatrixLoad>(slots[lane]);
      uint32_t both = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, column = 2 * (lane % 4) + half;
        const uint16_t x = load.transposed ? element[column][row] : element[row][column];
        both |= static_cast<uint32_t>(x) << (16 * half);
      }
      load.r[matrix] = both;
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, 16);
  MatrixLoad load = {row, r, false};
  emulator::meet_warp(&load, load_matrices_slots);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, 16);
  MatrixLoad load = {row, r, true};
  emulator::meet_warp(&load, load_matrices_slots);
}

template <class T>
float half_of(uint32_t both, int half) {
  const uint16_t bits = static_cast<uint16_t>(both >> (16 * half));
  if constexpr (std::is_same_v<T, bf16>)
    return bf16_to_float(bf16{bits});
  else
    return f16_to_float(f16{bits});
}

// PTX ISA, cvt.rna.tf32.f32: the low 13 bits are rounded away, halves away from zero.
inline uint32_t round_tf32(uint32_t x) {
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  return (x + 0x1000) & ~uint32_t{0x1fff};
}

template <class T>
struct MmaSumOf {
  using type = float;
};
template <>
struct MmaSumOf<int8_t> {
  using type = int32_t;
};
template <class T>
using MmaSum = typename MmaSumOf<T>::type;

template <class S>
struct Fragments {
  S* c;
  const uint32_t* a;
  uint32_t b[2];
};
using Mma = Fragments<float>;

// PTX ISA 9.7.14.5.8: a0,a1 (row g, k 2t+i), a2,a3 (row g+8), a4,a5 (row g, k+8), a6,a7 (row g+8, k+8).
template <class T>
inline void mma_16x8(MmaSum<T> (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma mine = {c, a, {b0, b1}};
  emulator::meet_warp(&mine, [](void** slots) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Mma>(slots[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = (i % 4 < 2) ? g : g + 8, k = 2 * t + (i & 1) + (i < 4 ? 0 : 8);
        A[row][k] = half_of<T>(m.a[i / 2], i & 1);
      }
      for (int i = 0; i < 4; ++i) B[2 * t + (i & 1) + (i < 2 ? 0 : 8)][g] = half_of<T>(m.b[i / 2], i & 1);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Mma>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = 2 * (lane % 4) + (i & 1);
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
        m.c[i] += sum;
      }
    }
  });
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32": a0 (row g, k 4 t + i), a1 (row g + 8), a2 (row g, k 16 + 4 t + i), a3;
// b0 (k 4 t + i), b1 (k 16 + 4 t + i).
template <>
inline void mma_16x8<int8_t>(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments<int32_t> mine = {c, a, {b0, b1}};
  emulator::meet_warp(&mine, [](void** slots) {
    int8_t A[16][32], B[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Fragments<int32_t>>(slots[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int word = 0; word < 4; ++word)
          A[g + 8 * (word % 2)][16 * (word / 2) + 4 * t + i] = static_cast<int8_t>(m.a[word] >> (8 * i));
      for (int i = 0; i < 4; ++i)
        for (int word = 0; word < 2; ++word) B[16 * word + 4 * t + i][g] = static_cast<int8_t>(m.b[word] >> (8 * i));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Fragments<int32_t>>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = 2 * (lane % 4) + (i & 1);
        for (int k = 0; k < 32; ++k) m.c[i] += A[row][k] * B[k][column];
      }
    }
  });
}

// The same places. What is added: products, and c, cut off below 2^-13 of the largest of them, as on 8.9
// (arXiv:2411.10958).
inline float sum_of_14_bits(const double (&terms)[33]) {
  double largest = 0, sum = 0;
  for (const double x : terms) {
    if (x != x) return NAN;
    largest = std::fmax(largest, std::fabs(x));
  }
  const int unit = largest > 0 ? std::ilogb(largest) - 13 : 0;
  const double units = std::ldexp(1.0, -unit);
  for (const double x : terms) sum += static_cast<double>(static_cast<int64_t>(x * units));
  return static_cast<float>(std::ldexp(sum, unit));
}
inline void tensor_cores_of_e4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments<float> mine = {c, a, {b0, b1}};
  emulator::meet_warp(&mine, [](void** slots) {
    float A[16][32], B[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Fragments<float>>(slots[lane]);
      const int g = lane / 4, t = lane % 4;
      const auto at = [](uint32_t word, int i) { return e4m3_to_float({static_cast<uint8_t>(word >> (8 * i))}); };
      for (int i = 0; i < 4; ++i) {
        for (int word = 0; word < 4; ++word) A[g + 8 * (word % 2)][16 * (word / 2) + 4 * t + i] = at(m.a[word], i);
        for (int word = 0; word < 2; ++word) B[16 * word + 4 * t + i][g] = at(m.b[word], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Fragments<float>>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = 2 * (lane % 4) + (i & 1);
        double terms[33];
        for (int k = 0; k < 32; ++k) terms[k] = static_cast<double>(A[row][k]) * B[k][column];
        terms[32] = m.c[i];
        m.c[i] = sum_of_14_bits(terms);
      }
    }
  });
}
template <>
inline void mma_16x8<e4m3>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float d[4] = {};
  tensor_cores_of_e4m3(d, a, b0, b1);
  for (int i = 0; i < 4; ++i) c[i] += d[i];
}

// PTX ISA 9.7.14.5.6: a0 (row g, k t), a1 (row g+8), a2 (row g, k t+4), a3 (row g+8, k t+4); b0 (k t), b1 (k t+4).
template <>
inline void mma_16x8<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma mine = {c, a, {b0, b1}};
  for (const uint32_t x : {a[0], a[1], a[2], a[3], b0, b1})
    if ((x & 0x7fffffff) <= 0x7f800000 && (x & 0x1fff)) emulator::stop("an operand is not rounded to TF32");
  emulator::meet_warp(&mine, [](void** slots) {
    float A[16][8], B[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Mma>(slots[lane]);
      const int g = lane / 4, t = lane % 4;
      A[g][t] = bits_to_float(m.a[0]);
      A[g + 8][t] = bits_to_float(m.a[1]);
      A[g][t + 4] = bits_to_float(m.a[2]);
      A[g + 8][t + 4] = bits_to_float(m.a[3]);
      B[t][g] = bits_to_float(m.b[0]);
      B[t + 4][g] = bits_to_float(m.b[1]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto m = emulator::value_of<Mma>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + (i & 1);
        float sum = 0;
        for (int k = 0; k < 8; ++k) sum += A[row][k] * B[k][column];
        m.c[i] += sum;
      }
    }
  });
}

template <class T>
T shuffle(T x, int lane) {
  struct Slot {
    T in, out;
    int lane;
  } mine = {x, x, lane};
  emulator::meet_warp(&mine, [](void** slots) {
    for (int i = 0; i < 32; ++i) {
      auto* slot = static_cast<Slot*>(slots[i]);
      slot->out = static_cast<Slot*>(slots[slot->lane])->in;
    }
  });
  return mine.out;
}

template <class T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, static_cast<int>(emulator::current->index.x % 32) ^ mask);
}

template <class T>
T warp_sum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace vit::cuda

#endif
