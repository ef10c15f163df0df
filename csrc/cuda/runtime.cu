// The parts of runtime.cuh that are no templates, and vit::info().
#include "driver.cuh"
#include "runtime.cuh"

namespace vit::cuda {

namespace {

std::atomic<Path> current_path{Path::automatic};

// A device attribute, asked for once per device; the cache holds value + 1, 0 is "not asked yet".
int attribute(cudaDeviceAttr which, int device, std::atomic<int> (&cache)[kMaxDevices]) {
  if (device < 0 || device >= kMaxDevices) return 0;
  int value = cache[device].load(std::memory_order_relaxed) - 1;
  if (value >= 0) return value;
  if (!went_well(cudaDeviceGetAttribute(&value, which, device))) return 0;
  cache[device].store(value + 1, std::memory_order_relaxed);
  return value;
}

// Whether this process has used a device, so that to make it current again costs nothing.
bool has_context(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);  // cuDevicePrimaryCtxGetState
  static std::atomic<void*> known{nullptr};
  const auto state = reinterpret_cast<GetState>(driver_function("cuDevicePrimaryCtxGetState", 7000, known));
  unsigned flags = 0;
  int active = 0;
  return !state || state(device, &flags, &active) != 0 || active != 0;
}

// Whether the driver knows programmatic dependent launches also in captures, which it does from 12.3 on.
bool driver_overlaps() {
  static std::atomic<int> known{0};
  int version = known.load(std::memory_order_relaxed);
  if (version == 0) {
    if (!went_well(cudaDriverGetVersion(&version))) return false;
    known.store(version, std::memory_order_relaxed);
  }
  return version >= 12030;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

void fail(const std::string& op, const std::string& what) { throw Error("cuda " + op + ": " + what); }

DeviceGuard::DeviceGuard(const char* op, const Context& context) {
  if (context.device < 0 || context.device >= kMaxDevices)
    fail(op, "device index " + std::to_string(context.device) + " is not in 0.." + std::to_string(kMaxDevices - 1));
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != context.device) {
    const bool used = has_context(current);
    error = cudaSetDevice(context.device);
    if (error == cudaSuccess && used) previous_ = current;
  }
  if (!went_well(error))
    fail(op, "cannot use device " + std::to_string(context.device) + ": " + cudaGetErrorString(error));
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) went_well(cudaSetDevice(previous_));
}

int capability(int device) {
  static std::atomic<int> major[kMaxDevices], minor[kMaxDevices];
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device, major) +
         attribute(cudaDevAttrComputeCapabilityMinor, device, minor);
}

bool has_hopper_kernels(int device) { return VIT_CUDA_WITH_HOPPER && capability(device) == 90; }

bool hopper_allowed(int device) {
  return path() != Path::portable && path() != Path::no_wgmma && has_hopper_kernels(device);
}

int multiprocessors(int device) {
  static std::atomic<int> count[kMaxDevices];
  return larger(1, attribute(cudaDevAttrMultiProcessorCount, device, count));
}

int shared_limit(int device) {
  static std::atomic<int> bytes[kMaxDevices];
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, bytes);
}

Path path() { return current_path.load(std::memory_order_relaxed); }
void set_path(Path path) { current_path.store(path, std::memory_order_relaxed); }

void check_launch(cudaError_t error, const Launch& launch) {
  if (went_well(error)) return;
  fail(launch.op, std::string(cudaGetErrorString(error)) + " while launching " + std::to_string(launch.blocks) +
                      " blocks of " + std::to_string(launch.threads) + " threads with " +
                      std::to_string(launch.shared_bytes) + " bytes of shared memory for " + launch.shape.text());
}

LaunchConfig::LaunchConfig(const Launch& launch, const void* kernel, std::atomic<bool> (&allowed)[kMaxDevices]) {
  if (launch.blocks > 0x7fffffff) fail(launch.op, "needs more than 2^31 blocks: " + launch.shape.text());
  const int device = launch.context.device;
  if (launch.shared_bytes > 48 * 1024) {
    const int limit = shared_limit(device);
    if (launch.shared_bytes > static_cast<std::size_t>(limit))
      fail(launch.op, "needs " + std::to_string(launch.shared_bytes) + " bytes of shared memory per block for " +
                          launch.shape.text() + ", this GPU has " + std::to_string(limit) +
                          ": use a smaller type, or the reference backend");
    if (!allowed[device].load(std::memory_order_acquire)) {
      check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), launch);
      allowed[device].store(true, std::memory_order_release);
    }
  }
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.context.stream);
  config.attrs = attributes;
  if (launch.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (launch.overlaps && path() != Path::no_overlap && driver_overlaps()) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
}

std::string Shape::text() const {
  std::string text;
  for (const auto& [key, value] : sizes)
    if (key) text += (text.empty() ? "" : " ") + std::string(key) + "=" + std::to_string(value);
  return text;
}

}  // namespace vit::cuda

// For the benchmark and the tests, which find it with ctypes: the number of a Path. Not part of vit.h: no result that a
// user sees depends on it beyond the rounding of a float32 sum.
extern "C" __attribute__((visibility("default"))) void vit_cuda_set_path(int path) {
  vit::cuda::set_path(static_cast<vit::cuda::Path>(path));
}

// For python/vit/backends/cuda.py, which compares it with vit_cuda_attention_shared (attention.cu).
extern "C" __attribute__((visibility("default"))) int vit_cuda_shared_limit(int device) {
  return vit::cuda::shared_limit(device);
}

namespace vit {

bool takes(DType dtype) { return dtype >= DType::float32 && dtype <= DType::float16; }
const char* const kTakes = "the cuda backend takes float32, float64, bfloat16 and float16";

std::vector<std::pair<std::string, std::string>> info() {
  int driver = 0, devices = 0;
  std::vector<std::pair<std::string, std::string>> facts;
  if (!cuda::went_well(cudaDriverGetVersion(&driver))) driver = 0;  // 0 without a driver
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (!cuda::went_well(error)) devices = 0;
  facts.emplace_back("runtime", cuda::version_text(CUDART_VERSION));
  facts.emplace_back("driver", driver == 0 ? "none" : cuda::version_text(driver));
  facts.emplace_back("architectures", VIT_CUDA_ARCHITECTURES);
  facts.emplace_back("compiler", VIT_CUDA_COMPILER);
  facts.emplace_back("devices", std::to_string(devices));
  if (error != cudaSuccess) facts.emplace_back("error", cudaGetErrorString(error));
  for (int i = 0; i < devices && i < cuda::kMaxDevices; ++i) {
    cudaDeviceProp properties;
    if (!cuda::went_well(cudaGetDeviceProperties(&properties, i))) continue;
    const int capability = 10 * properties.major + properties.minor;
    const std::string key = "device" + std::to_string(i);
    facts.emplace_back(key, std::string(properties.name) + ", compute capability " + std::to_string(properties.major) +
                                "." + std::to_string(properties.minor) + ", " +
                                std::to_string(properties.multiProcessorCount) + " multiprocessors, " +
                                std::to_string(properties.totalGlobalMem >> 20) + " MiB");
    facts.emplace_back(key + ".kernels", cuda::has_hopper_kernels(i) ? "hopper"
                                         : capability >= 80          ? "portable"
                                                                     : "none");
  }
  return facts;
}

}  // namespace vit
