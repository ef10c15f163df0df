// The part of the CUDA runtime that the module needs, for a machine without a GPU: remembers the names of kernels and
// hands every launch to a callback, which runs the PTX of that name.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>

namespace {

using Callback = int (*)(const char* name, unsigned grid, unsigned threads, size_t shared, unsigned cluster,
                         int overlaps, void** arguments);
Callback callback = nullptr;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> map;
  return map;
}
std::map<std::pair<int, const void*>, int> permitted;  // shared memory of a kernel on a device
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;  // until it is asked for

const int kDevices = 5;
const int kMajor[kDevices] = {9, 8, 8, 12, 8}, kMinor[kDevices] = {0, 0, 6, 0, 9};
const int kShared[kDevices] = {227, 163, 99, 99, 99};
bool contexts[kDevices];
int multiprocessors = 4;

cudaError_t failed(cudaError_t error) { return last = error; }

// A stream capture, which a test begins and ends: Python keeps the launches. What asks the runtime for anything else
// fails and is kept by name: in a capture, made after a call that warmed up, its answer should be known. Calls that
// have to do with memory or synchronise are none that this runtime has: a module with one does not load.
bool capturing = false;
std::string refused;
bool refused_in_capture(const char* what) {
  if (capturing) refused += std::string(refused.empty() ? "" : " ") + what;
  return capturing;
}
#define VIT_REFUSED_IN_CAPTURE \
  if (refused_in_capture(__func__)) return failed(cudaErrorStreamCaptureUnsupported)

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* dims,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 3 || reinterpret_cast<uintptr_t>(data) % 16 || reinterpret_cast<uintptr_t>(map) % 64)
    return CUDA_ERROR_INVALID_VALUE;
  const int size = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2 : 0;
  for (int i = 0; i < 3; ++i)
    if (dims[i] == 0 || dims[i] > (1ull << 32) || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i)
    if (strides[i] % 16 || strides[i] >= (1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
  if (size == 0 || box[0] * size > 128) return CUDA_ERROR_INVALID_VALUE;
  uint64_t words[16] = {0x70616D726F736E74ull,
                        reinterpret_cast<uint64_t>(data),
                        dims[0],
                        dims[1],
                        dims[2],
                        strides[0],
                        strides[1],
                        box[0],
                        box[1],
                        box[2],
                        static_cast<uint64_t>(size),
                        static_cast<uint64_t>(swizzle)};
  std::memcpy(map, words, sizeof words);
  return CUDA_SUCCESS;
}

int context_state(int device, unsigned* flags, int* active) {  // cuDevicePrimaryCtxGetState
  *flags = 0;
  *active = contexts[device];
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// For Python: who runs a launch; the error that the next call of the runtime would find.
__attribute__((visibility("default"))) int vit_stub_error() { return last; }
__attribute__((visibility("default"))) void vit_stub_set(Callback f, int count) {
  callback = f;
  multiprocessors = count;
}
// A capture: begins (1) or ends (0); the names of the calls it refused.
__attribute__((visibility("default"))) void vit_emulator_capture(int on) {
  capturing = on;
  if (on) refused.clear();
}
__attribute__((visibility("default"))) const char* vit_emulator_refused() { return refused.c_str(); }

void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(1); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = device;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  if (!contexts[device]) VIT_REFUSED_IN_CAPTURE;
  contexts[device] = true;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the emulated kernel failed" : "CUDA error";
}
cudaError_t cudaGetDeviceCount(int* count) {
  VIT_REFUSED_IN_CAPTURE;
  *count = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  VIT_REFUSED_IN_CAPTURE;
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) {
  VIT_REFUSED_IN_CAPTURE;
  return failed(cudaErrorInvalidValue);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  VIT_REFUSED_IN_CAPTURE;
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = kMajor[device];
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kMinor[device];
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kShared[device] * 1024;
      return cudaSuccess;
    default:
      return failed(cudaErrorInvalidValue);
  }
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  VIT_REFUSED_IN_CAPTURE;
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kShared[current] * 1024)
    return failed(cudaErrorInvalidValue);
  permitted[{current, kernel}] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  VIT_REFUSED_IN_CAPTURE;
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") == 0       ? reinterpret_cast<void*>(&encode)
              : std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0 ? reinterpret_cast<void*>(&context_state)
                                                                     : nullptr;
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const auto name = names().find(kernel);
  contexts[current] = true;
  if (!callback || name == names().end()) return failed(cudaErrorInvalidDeviceFunction);
  const auto limit = permitted.find({current, kernel});
  if (config->dynamicSmemBytes > static_cast<size_t>(limit == permitted.end() ? 48 * 1024 : limit->second))
    return failed(cudaErrorInvalidValue);
  unsigned cluster = 1;
  int overlaps = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = attribute.val.programmaticStreamSerializationAllowed;
  }
  if (overlaps && kMajor[current] < 9) return failed(cudaErrorNotSupported);
  const int code = callback(name->second.c_str(), config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                            cluster, overlaps, arguments);
  return code ? failed(cudaErrorLaunchFailure) : cudaSuccess;
}

}  // extern "C"
