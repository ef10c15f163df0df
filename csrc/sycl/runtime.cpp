// Finding the Intel libraries, choosing a device, compiling and caching kernels, staging memory; vit::info().
#include "runtime.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>

#include "check.h"
#include "layer_norm.h"
#include "sources.h"

namespace vit::device {

namespace ex = sycl::ext::oneapi::experimental;

struct Device {
  sycl::context context;
  sycl::device device;
  Variant variant;
  int compute_units;
  bool system_usm;
  std::map<std::uint64_t, std::unique_ptr<Bundle>> bundles;
  std::mutex mutex;

  Device(const sycl::context& c, const sycl::device& d);
};

namespace {

// ----- the libraries of the wheels, which hold no paths to each other

std::string library_folder() {
  Dl_info found;
  if (!dladdr(reinterpret_cast<void*>(&sycl::platform::get_platforms), &found) || !found.dli_fname) return "";
  char resolved[PATH_MAX];  // the name it was loaded by may go through "..", as that of a wheel's file does
  const std::string file = realpath(found.dli_fname, resolved) ? resolved : found.dli_fname;
  const std::size_t slash = file.rfind('/');
  return slash == std::string::npos ? "" : file.substr(0, slash + 1);
}

bool exists(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0;
}

// The compiled code is for this processor: a home directory shared with another one must not mix them up.
std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (std::string line; std::getline(cpuinfo, line) && !line.empty();)
    if (line.rfind("model name", 0) == 0 || line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0)
      for (const char c : line) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  std::ostringstream text;
  text << std::hex << hash;
  return text.str();
}

// Names the OpenCL driver of the wheel and a cache of compiled kernels, unless the user has named others, and loads
// what the loader of libOpenCL would not find: its dependencies lie beside it, but it does not say so.
void prepare_libraries() {
  const std::string folder = library_folder();
  if (exists(folder + "libintelocl.so")) setenv("OCL_ICD_FILENAMES", (folder + "libintelocl.so").c_str(), 0);
  for (const char* name : {"libintlc.so.5", "libimf.so", "libirng.so", "libsvml.so", "libOpenCL.so.1"})
    if (exists(folder + name)) dlopen((folder + name).c_str(), RTLD_NOW | RTLD_GLOBAL);

  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::string root = cache && *cache ? cache : home && *home ? std::string(home) + "/.cache" : "";
  setenv("SYCL_CACHE_PERSISTENT", "1", 0);
  if (!root.empty()) setenv("SYCL_CACHE_DIR", (root + "/vit/sycl-" + processor()).c_str(), 0);
}

// ----- the device

std::string log_of_failure;

int rank(const sycl::device& d) {
  const bool intel = d.get_info<sycl::info::device::vendor_id>() == 0x8086;
  if (d.is_gpu() && intel) return d.get_backend() == sycl::backend::ext_oneapi_level_zero ? 3 : 2;
  return d.is_cpu() ? 1 : 0;
}

sycl::device choose_device() {
  std::vector<sycl::device> found;
  for (const sycl::platform& platform : sycl::platform::get_platforms())
    for (const sycl::device& device : platform.get_devices())
      if (rank(device) > 0) found.push_back(device);
  if (found.empty())
    throw Error(
        "no SYCL device: neither an Intel GPU with its driver nor the OpenCL runtime for the CPU is installed; "
        "pip install intel-opencl-rt for the CPU");
  sycl::device best =
      *std::max_element(found.begin(), found.end(), [](const auto& a, const auto& b) { return rank(a) < rank(b); });
  if (!best.ext_oneapi_can_build(ex::source_language::sycl))
    throw Error("the SYCL run-time compiler (libsycl-jit) is missing for " + best.get_info<sycl::info::device::name>() +
                "; pip install intel-sycl-rt");
  return best;
}

Variant variant_for(const sycl::device& d, bool system_usm) {
  Variant variant;
  if (!d.is_cpu()) {
    const auto sizes = d.get_info<sycl::info::device::sub_group_sizes>();
    const bool has_16 = std::find(sizes.begin(), sizes.end(), std::size_t{16}) != sizes.end();
    variant.lanes = has_16 || sizes.empty() ? 16 : static_cast<int>(sizes.back());
    variant.sub_groups = 8;
    variant.local = true;
    variant.whole_heads = false;
  }
  variant.staged = !system_usm;
  return variant;
}

sycl::queue& own_queue() {
  static sycl::queue* queue = [] {
    prepare_libraries();
    // Never deleted: at exit the driver's own libraries may already be gone.
    return new sycl::queue(choose_device(), sycl::property_list{sycl::property::queue::in_order{}});
  }();
  return *queue;
}

struct Devices {
  std::mutex mutex;
  std::vector<std::unique_ptr<Device>> known;
  std::optional<Variant> forced;  // by the tests alone
};

Devices& devices() {
  static Devices* devices = new Devices;  // never deleted, as the queue
  return *devices;
}

// The device of a queue; each context has its own compiled kernels.
Device& device_of(const sycl::queue& queue) {
  const std::lock_guard<std::mutex> lock(devices().mutex);
  for (const auto& device : devices().known)
    if (device->context == queue.get_context() && device->device == queue.get_device()) return *device;
  devices().known.push_back(std::make_unique<Device>(queue.get_context(), queue.get_device()));
  return *devices().known.back();
}

sycl::queue& queue_of(const Context& context) {
  return context.stream ? *static_cast<sycl::queue*>(context.stream) : own_queue();
}

// ----- compiling

std::string first_lines(const std::string& text, int lines) {
  std::size_t end = 0;
  while (lines-- > 0 && end != std::string::npos) end = text.find('\n', end ? end + 1 : 0);
  return end == std::string::npos ? text : text.substr(0, end) + "\n...";
}

std::uint64_t key_of(const Family& family, const std::vector<DType>& dtypes, const Variant& v) {
  std::uint64_t key = 0;
  for (const DType dtype : dtypes) key = key << 3 | (static_cast<std::uint64_t>(dtype) + 1);
  key |= static_cast<std::uint64_t>(family.id) << 16;
  return ((key << 8 | static_cast<std::uint64_t>(v.lanes)) << 8 | static_cast<std::uint64_t>(v.sub_groups)) << 1 |
         (v.local ? 1 : 0);
}

std::unique_ptr<Bundle> compile(Device& device, const Family& family, const std::vector<DType>& dtypes) {
  const Variant& v = device.variant;
  const std::vector<std::string> names = family.kernels(dtypes);
  const std::set<std::string> once(names.begin(), names.end());
  ex::include_files headers;
  for (const auto& [name, text] : kernel_sources()) headers.add(name, text);
  const std::string source = "#include \"" + std::string(family.header) + "\"\n";
  const std::vector<std::string> options = {"-DVIT_LANES=" + std::to_string(v.lanes),
                                            "-DVIT_SUB_GROUPS=" + std::to_string(v.sub_groups),
                                            "-DVIT_LOCAL=" + std::to_string(v.local ? 1 : 0)};
  auto bundle = std::make_unique<Bundle>();
  try {
    auto parsed = ex::create_kernel_bundle_from_source(device.context, ex::source_language::sycl, source,
                                                       ex::properties{headers});
    auto built = ex::build(parsed, {device.device},
                           ex::properties{ex::build_options{options},
                                          ex::registered_names{std::vector<std::string>(once.begin(), once.end())}});
    for (const std::string& name : names) bundle->kernels.push_back(built.ext_oneapi_get_kernel(name));
  } catch (const sycl::exception& e) {
    log_of_failure = e.what();
    throw Error(std::string("the SYCL run-time compiler failed on ") + family.header + " for " +
                device.device.get_info<sycl::info::device::name>() +
                " (are the C++ standard headers installed? apt install g++):\n" + first_lines(log_of_failure, 20));
  }
  return bundle;
}

const Bundle& bundle_of(Device& device, const Family& family, const std::vector<DType>& dtypes) {
  const std::lock_guard<std::mutex> lock(device.mutex);
  std::unique_ptr<Bundle>& bundle = device.bundles[key_of(family, dtypes, device.variant)];
  if (!bundle) bundle = compile(device, family, dtypes);
  return *bundle;
}

}  // namespace

Device::Device(const sycl::context& c, const sycl::device& d)
    : context(c),
      device(d),
      compute_units(static_cast<int>(d.get_info<sycl::info::device::max_compute_units>())),
      system_usm(d.has(sycl::aspect::usm_system_allocations)) {
  variant = devices().forced.value_or(variant_for(d, system_usm));
}

// ----- a call

Call::Call(const char* op, const Context& context) : op_(op), host_memory_(!context.stream) {
  try {
    queue_ = &queue_of(context);
    device_ = &device_of(*queue_);
  } catch (const sycl::exception& e) {
    fail(e.what());
  }
  staged_ = host_memory_ && device_->variant.staged;
}

Call::~Call() {
  for (const Copy& copy : copies_) sycl::free(copy.device, device_->context);
}

void Call::fail(const std::string& what) const { throw Error(std::string(op_) + ": " + what); }

const Bundle& Call::bundle(const Family& family, const std::vector<DType>& dtypes) {
  return bundle_of(*device_, family, dtypes);
}

const Variant& Call::variant() const { return device_->variant; }

const void* Call::staged_in(const void* p, int64_t elements, std::size_t size) {
  if (!staged_ || !p || elements <= 0) return p;
  const std::size_t bytes = static_cast<std::size_t>(elements) * size;
  void* copy = scratch(nullptr, bytes);
  try {
    queue_->memcpy(copy, p, bytes);
  } catch (const sycl::exception& e) {
    fail(e.what());
  }
  return copy;
}

void* Call::out(void* p, int64_t elements, std::size_t size) {
  if (!staged_ || !p || elements <= 0) return p;
  const std::size_t bytes = static_cast<std::size_t>(elements) * size;
  void* copy = scratch(nullptr, bytes);
  copies_.back() = {copy, p, bytes};
  return copy;
}

void* Call::inout(void* p, int64_t elements, std::size_t size) {
  const void* copy = staged_in(p, elements, size);
  if (copy != p) copies_.back().host = p;
  return const_cast<void*>(copy);
}

void* Call::scratch(void* workspace, std::size_t bytes) {
  if (!staged_ || bytes == 0) return workspace;
  void* memory = sycl::malloc_device(bytes, *queue_);
  if (!memory) fail("the device has no " + std::to_string(bytes) + " bytes left");
  copies_.push_back({memory, nullptr, bytes});
  return memory;
}

void Call::finish() {
  try {
    for (const Copy& copy : copies_)
      if (copy.host) queue_->memcpy(copy.host, copy.device, copy.bytes);
    if (host_memory_) queue_->wait_and_throw();
  } catch (const sycl::exception& e) {
    fail(e.what());
  }
}

int64_t persistent_units(const Context& context, int64_t tasks) {
  const Device& device = device_of(queue_of(context));
  // On a CPU 8 per core even out their ends; a GPU's compute unit holds 64 hardware threads at most.
  return std::min<int64_t>(tasks, static_cast<int64_t>(device.compute_units) * (device.device.is_cpu() ? 8 : 64));
}

const Variant& variant_of(const Context& context) { return device_of(queue_of(context)).variant; }

const char* type_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float";
    case DType::float64:
      return "double";
    case DType::bfloat16:
      return "bf16";
    case DType::float16:
      return "f16";
  }
  return "";
}

DType accumulator(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

std::size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace vit::device

namespace vit {

bool takes(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16 || dtype == DType::float16;
}
const char* const kTakes = "the sycl backend takes float32, float64, bfloat16 and float16";

// Compiles one family as well: a device whose kernels cannot be compiled is as good as none.
std::vector<std::pair<std::string, std::string>> info() {
  using namespace device;
  try {
    Device& chosen = device_of(own_queue());
    bundle_of(chosen, kLayerNormForward, {DType::float32, DType::float32});
    const sycl::device& d = chosen.device;
    const sycl::platform platform = d.get_platform();
    return {{"device", d.get_info<sycl::info::device::name>()},
            {"driver",
             platform.get_info<sycl::info::platform::name>() + " " + d.get_info<sycl::info::device::driver_version>()},
            {"runtime", library_folder() + "libsycl.so"},
            {"headers", std::to_string(__LIBSYCL_MAJOR_VERSION) + "." + std::to_string(__LIBSYCL_MINOR_VERSION)},
            {"compute units", std::to_string(chosen.compute_units)},
            {"sub-group", std::to_string(chosen.variant.lanes)},
            {"host memory", chosen.variant.staged ? "copied" : "used in place"},
            {"kernel cache", std::getenv("SYCL_CACHE_DIR") ? std::getenv("SYCL_CACHE_DIR") : "none"}};
  } catch (const sycl::exception& e) {
    throw Error(std::string("SYCL finds no usable device: ") + e.what());
  }
}

}  // namespace vit

// For the tests, by ctypes: the variants meant for other devices, on this one; lanes = 0 brings its own back. No op may
// be running.
extern "C" __attribute__((visibility("default"))) void vit_sycl_variant(int lanes, int sub_groups, int local,
                                                                        int staged) {
  using namespace vit::device;
  const std::lock_guard<std::mutex> lock(devices().mutex);
  devices().forced.reset();
  if (lanes) devices().forced = Variant{lanes, sub_groups, local != 0, staged != 0, sub_groups == 1};
  for (const auto& device : devices().known)
    device->variant = devices().forced.value_or(variant_for(device->device, device->system_usm));
}

// What the run-time compiler said when it last failed, in full.
extern "C" __attribute__((visibility("default"))) const char* vit_sycl_log() {
  return vit::device::log_of_failure.c_str();
}
