#include "cpu/engine/engine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <new>

#include "cpu/kernels.h"

namespace vit::engine {
namespace {

constexpr int kMaxThreads = 1024;
const char* const kFormat = "vit-engine";

[[noreturn]] void invalid(const std::string& text) { throw EngineError(kInvalid, "vit engine: " + text); }

// --- sizes ----------------------------------------------------------------------------------------------------------

// The integer fields of a config under the names they have in an engine file.
template <class C, class F>
void for_fields(C& config, const F& f) {
  f("precision", config.precision);
  f("pool", config.pool);
  f("activation", config.activation);
  f("dynamic_pad", config.dynamic_pad);
  f("norm_first", config.norm_first);
  f("channels", config.channels);
  f("image_height", config.image_height);
  f("image_width", config.image_width);
  f("patch_height", config.patch_height);
  f("patch_width", config.patch_width);
  f("prefix_tokens", config.prefix_tokens);
  f("embed_dim", config.embed_dim);
  f("depth", config.depth);
  f("num_heads", config.num_heads);
  f("mlp_width", config.mlp_width);
  f("num_classes", config.num_classes);
}

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of any one size: no product of three overflows

void check_config(const vit_engine_config& c) {
  const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      invalid(std::string(name) + " is " + std::to_string(value) + "; allowed are " + std::to_string(low) + " to " +
              std::to_string(high));
  };
  within("precision", c.precision, VIT_FLOAT32, VIT_INT8);
  within("pool", c.pool, VIT_POOL_TOKEN, VIT_POOL_NONE);
  within("activation", c.activation, VIT_GELU, VIT_GELU_TANH);
  within("channels", c.channels, 1, 4096);
  within("image_height", c.image_height, 1, 65536);
  within("image_width", c.image_width, 1, 65536);
  within("patch_height", c.patch_height, 1, 4096);
  within("patch_width", c.patch_width, 1, 4096);
  within("prefix_tokens", c.prefix_tokens, c.pool == VIT_POOL_TOKEN ? 1 : 0, 4096);
  within("embed_dim", c.embed_dim, 1, 65536);
  within("depth", c.depth, 1, 4096);
  within("num_heads", c.num_heads, 1, c.embed_dim);
  within("mlp_width", c.mlp_width, 1, kMaxSize);
  within("num_classes", c.num_classes, 0, kMaxSize);
  if (c.embed_dim % c.num_heads)
    invalid("embed_dim " + std::to_string(c.embed_dim) + " is not a multiple of num_heads " +
            std::to_string(c.num_heads));
  if (!(c.norm_eps >= 0 && std::isfinite(c.norm_eps))) invalid("norm_eps is " + std::to_string(c.norm_eps));
  const int64_t multiple = c.precision == VIT_FLOAT32 ? 1 : c.precision == VIT_BFLOAT16 ? 2 : 4;
  for (const auto& [name, size] : {std::pair("embed_dim", c.embed_dim), std::pair("mlp_width", c.mlp_width)})
    if (size % multiple)
      throw EngineError(kUnsupported, "vit engine: " + std::string(name) + " is " + std::to_string(size) +
                                          "; this precision needs a multiple of " + std::to_string(multiple) +
                                          ". Use float32");
}

Shape shape_of(const vit_engine_config& c) {
  Shape s{};
  s.precision = static_cast<Precision>(c.precision);
  s.pool = static_cast<Pool>(c.pool);
  s.activation = static_cast<Activation>(c.activation);
  s.dynamic_pad = c.dynamic_pad != 0, s.norm_first = c.norm_first != 0;
  s.channels = c.channels, s.height = c.image_height, s.width = c.image_width;
  s.patch_height = c.patch_height, s.patch_width = c.patch_width;
  s.prefix = c.prefix_tokens, s.C = c.embed_dim, s.depth = c.depth, s.H = c.num_heads;
  s.hidden = c.mlp_width, s.classes = c.num_classes, s.eps = c.norm_eps;
  return s;
}

// --- parts ----------------------------------------------------------------------------------------------------------

// One tensor of an engine file and where the network keeps its address.
struct Part {
  std::string name;
  float** vector;  // of `count` floats, or
  Linear* matrix;  // a packed weight, or
  int32_t** sums;  // of a quantized weight
  int64_t count;
  bool optional;  // zeros where the source lacks it
  bool derived;   // made when the weight is packed
};

// The dtypes of packed weights, in the order of Precision; a code of two compressed weights is one integer.
const char* const kDtypes[] = {"F32", "BF16", "I8", "U16", "U8"};

const char* dtype_of(Precision precision) { return kDtypes[static_cast<int>(precision)]; }

bool in_block(const std::string& name) { return name.compare(0, 7, "blocks.") == 0; }

// Of the layers outside the blocks: the ends of an int8 network stay what its activations are, the head of every
// network is float32.
Precision precision_of_end(const std::string& name, Precision engine) {
  if (name == "head") return Precision::float32;
  return engine == Precision::int8 ? Precision::bfloat16 : engine;
}

// Whether a layer may have a precision in an engine of another one.
bool allowed(const std::string& name, Precision layer, Precision engine) {
  if (!in_block(name)) return layer == precision_of_end(name, engine);
  if (engine == Precision::bfloat16 && stored(layer)) return true;
  return layer == engine || (engine == Precision::int8 && layer == Precision::bfloat16);
}

// Every linear layer with its sizes, the embedding first and the head last.
void for_linears(Network& n, const std::function<void(const std::string&, Linear&, int64_t, int64_t)>& f) {
  const Shape& s = n.shape;
  f("patch_embed.proj", n.patch, s.C, s.patch_values());
  for (int64_t i = 0; i < s.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i);
    f(block + ".attn.qkv", n.blocks[i].qkv, 3 * s.C, s.C);
    f(block + ".attn.proj", n.blocks[i].proj, s.C, s.C);
    f(block + ".mlp.fc1", n.blocks[i].fc1, s.hidden, s.C);
    f(block + ".mlp.fc2", n.blocks[i].fc2, s.C, s.hidden);
  }
  if (s.classes) f("head", n.head, s.classes, s.C);
}

// All tensors of the network; the precision of every linear layer is known.
std::vector<Part> parts_of(Network& n) {
  const Shape& s = n.shape;
  std::vector<Part> parts;
  const auto vector = [&](const std::string& name, float*& at, int64_t count, bool optional = false) {
    parts.push_back({name, &at, nullptr, nullptr, count, optional, false});
  };
  const auto norm = [&](const std::string& name, Norm& norm) {
    vector(name + ".weight", norm.weight, s.C);
    vector(name + ".bias", norm.bias, s.C);
  };
  vector("mean", n.mean, s.channels);
  vector("std", n.std, s.channels);
  if (s.prefix) vector("prefix", n.prefix, s.prefix * s.C);
  vector("positions", n.positions, s.patches() * s.C, true);
  for (int64_t i = 0; i < s.depth; ++i) {
    norm("blocks." + std::to_string(i) + ".norm1", n.blocks[i].norm1);
    norm("blocks." + std::to_string(i) + ".norm2", n.blocks[i].norm2);
  }
  norm("norm", n.norm);
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t N, int64_t K) {
    linear.N = N, linear.K = K;
    n.shape.unpacks |= stored(linear.precision);
    if (linear.precision == Precision::int8) {
      parts.push_back({name + ".scale", &linear.scale, nullptr, nullptr, N, false, true});
      parts.push_back({name + ".sums", nullptr, nullptr, &linear.sums, N, false, true});
    }
    parts.push_back({name + ".weight", nullptr, &linear, nullptr, N * K, false, false});
    vector(name + ".bias", linear.bias, N, true);
  });
  return parts;
}

int64_t bytes_of(const Part& part) {
  return part.matrix ? active_kernels().engine_packed_bytes(*part.matrix)
                     : part.count * static_cast<int64_t>(sizeof(float));
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Record record_of(const Part& part, int64_t begin) {
  // Lengths are rounded up to a cache line: safetensors has no gaps between tensors.
  return {part.name,
          part.matrix ? dtype_of(part.matrix->precision)
          : part.sums ? "I32"
                      : "F32",
          begin, begin + aligned(bytes_of(part))};
}

void point(const Part& part, char* at) {
  if (part.matrix)
    part.matrix->weight = at;
  else if (part.sums)
    *part.sums = reinterpret_cast<int32_t*>(at);
  else
    *part.vector = reinterpret_cast<float*>(at);
}

// --- sources --------------------------------------------------------------------------------------------------------

using Sources = std::map<std::string, const vit_tensor*>;

const vit_tensor* find(const Sources& sources, const Part& part) {
  const auto found = sources.find(part.name);
  if (found == sources.end()) {
    if (!part.optional) invalid("tensor " + part.name + " is missing");
    return nullptr;
  }
  const vit_tensor& tensor = *found->second;
  if (tensor.count != part.count || !tensor.data)
    invalid("tensor " + part.name + " has " + std::to_string(tensor.count) + " values; " + std::to_string(part.count) +
            " are needed");
  return &tensor;
}

Precision precision_of(const Sources& sources, const std::string& name, Precision widest) {
  const auto found = sources.find(name + ".weight");
  if (found == sources.end()) invalid("tensor " + name + ".weight is missing");
  const auto precision = static_cast<Precision>(found->second->precision);
  if (!allowed(name, precision, widest))
    invalid("tensor " + name + ".weight is to be packed as precision " + std::to_string(int(precision)) +
            ", which the engine's does not allow here");
  return precision;
}

std::string seventeen_digits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

}  // namespace

// --- construction ---------------------------------------------------------------------------------------------------

Engine::Engine(const vit_engine_config& config, int64_t max_batch) : config_(config), max_batch_(max_batch) {
  if (max_batch < 0) invalid("max_batch is " + std::to_string(max_batch) + "; 0 means no limit");
  check_config(config);
  network_.shape = shape_of(config);
  blocks_.resize(static_cast<std::size_t>(config.depth));
  tokens_.resize(blocks_.size());
  attention_.resize(blocks_.size());
  network_.blocks = blocks_.data();
}

std::unique_ptr<Engine> Engine::build(const vit_engine_config& config, const vit_tensor* tensors, int64_t num_tensors,
                                      const Texts& texts, int64_t max_batch) {
  std::unique_ptr<Engine> engine(new Engine(config, max_batch));
  Network& n = engine->network_;
  Sources sources;
  for (int64_t i = 0; i < num_tensors; ++i) sources[tensors[i].name] = &tensors[i];

  const Precision precision = n.shape.precision;
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t, int64_t) {
    linear.precision = in_block(name) ? precision_of(sources, name, precision) : precision_of_end(name, precision);
  });
  const std::vector<Part> parts = parts_of(n);
  std::vector<Record> records;
  int64_t bytes = 0;
  for (const Part& part : parts) {
    records.push_back(record_of(part, bytes));
    bytes = records.back().end;
  }
  engine->texts_ = texts;
  Texts& written = engine->texts_;
  written["format"] = kFormat;
  written["version"] = std::to_string(VIT_ENGINE_VERSION);
  written["isa"] = active_level();
  written["norm_eps"] = seventeen_digits(config.norm_eps);
  for_fields(config, [&](const char* name, auto value) { written[name] = std::to_string(value); });
  const std::string header = write_header(written, records);

  engine->image_ = Mapping::anonymous(header.size() + static_cast<std::size_t>(bytes), "packed weights");
  char* data = engine->image_.data() + header.size();
  std::memcpy(engine->image_.data(), header.data(), header.size());
  for (std::size_t i = 0; i < parts.size(); ++i) point(parts[i], data + records[i].begin);
  for (const Part& part : parts) {
    if (part.derived) continue;
    const vit_tensor* source = find(sources, part);
    if (part.vector) {
      if (source && part.count > 0)
        std::memcpy(*part.vector, source->data, static_cast<std::size_t>(part.count) * sizeof(float));
    } else {
      active_kernels().engine_pack({source->data, part.matrix, default_threads()});
    }
  }
  if (max_batch) engine->reserve(max_batch, default_threads());
  return engine;
}

std::unique_ptr<Engine> Engine::open(const std::string& path, int64_t max_batch) {
  const auto refuse = [&](const std::string& why) { throw EngineError(kFile, "vit engine: " + path + " " + why); };
  Mapping image = Mapping::file(path);
  Header header = read_header(image.data(), image.size(), path);
  const auto text = [&](const std::string& key) {
    const auto found = header.texts.find(key);
    if (found == header.texts.end()) refuse("is not an engine file: it says nothing about " + key);
    return found->second;
  };
  if (header.texts.count("format") == 0 || text("format") != kFormat)
    refuse("is not an engine file but other safetensors; make one with vit.Engine(model).save(path)");
  if (text("version") != std::to_string(VIT_ENGINE_VERSION))
    refuse("has format version " + text("version") + ", this library reads " + std::to_string(VIT_ENGINE_VERSION) +
           "; save it again with this version of vit");
  if (text("isa") != active_level())
    refuse("was made for the instruction-set level " + text("isa") + ", this process uses " + active_level() +
           "; save it again on a machine of this kind");

  vit_engine_config config{};
  for_fields(config, [&](const char* name, auto& value) {
    char* end = nullptr;
    const std::string digits = text(name);
    value = static_cast<std::remove_reference_t<decltype(value)>>(std::strtoll(digits.c_str(), &end, 10));
    if (digits.empty() || *end) refuse("is damaged: " + std::string(name) + " is \"" + digits + "\"");
  });
  config.norm_eps = std::strtod(text("norm_eps").c_str(), nullptr);
  std::unique_ptr<Engine> engine;
  try {
    engine.reset(new Engine(config, max_batch));
  } catch (const EngineError& error) {
    if (max_batch < 0) throw;
    refuse("is damaged: " + std::string(error.what()));
  }
  Network& n = engine->network_;

  const auto record = [&](const std::string& name) -> const Record& {
    const auto found = header.records.find(name);
    if (found == header.records.end()) refuse("is damaged: tensor " + name + " is missing");
    return found->second;
  };
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t, int64_t) {
    const std::string& dtype = record(name + ".weight").dtype;
    const auto* const end = std::end(kDtypes);
    const auto* const found = std::find(std::begin(kDtypes), end, dtype);
    if (found == end) refuse("is damaged: tensor " + name + ".weight is of type " + dtype);
    linear.precision = static_cast<Precision>(found - std::begin(kDtypes));
    if (!allowed(name, linear.precision, n.shape.precision))
      refuse("is damaged: " + name + ".weight is " + dtype + ", which this engine's precision does not allow");
  });
  char* data = image.data() + header.bytes;
  for (const Part& part : parts_of(n)) {
    const Record& stored = record(part.name);
    const Record wanted = record_of(part, stored.begin);
    if (stored.dtype != wanted.dtype || stored.end != wanted.end || (header.bytes + stored.begin) % 64)
      refuse("is damaged: tensor " + part.name + " has " + std::to_string(stored.end - stored.begin) + " bytes of " +
             stored.dtype + ", not " + std::to_string(wanted.end - wanted.begin) + " of " + wanted.dtype);
    point(part, data + stored.begin);
  }
  engine->texts_ = std::move(header.texts);
  engine->image_ = std::move(image);
  if (max_batch) engine->reserve(max_batch, default_threads());
  return engine;
}

void Engine::save(const std::string& path) const {
  const std::string part = path + ".part";  // a program that has the old file mapped keeps it
  std::FILE* file = std::fopen(part.c_str(), "wb");
  bool ok = file && std::fwrite(image_.data(), 1, image_.size(), file) == image_.size();
  if (file) ok = (std::fclose(file) == 0) && ok;
  ok = ok && std::rename(part.c_str(), path.c_str()) == 0;
  if (ok) return;
  const int error = errno;
  if (file) std::remove(part.c_str());
  throw EngineError(kFile, "vit engine: cannot write " + path + ": " + std::strerror(error));
}

const char* Engine::text(const std::string& key) const {
  const auto found = texts_.find(key);
  return found == texts_.end() ? nullptr : found->second.c_str();
}

// --- forward --------------------------------------------------------------------------------------------------------

void Engine::reserve(int64_t batch, int threads) {
  const auto bytes = static_cast<std::size_t>(active_kernels().engine_bytes(network_, batch, threads));
  if (bytes > arena_.size()) {
    arena_ = Mapping();  // first, so that never both are there
    arena_ = Mapping::anonymous(bytes, "intermediate results");
  }
  if (barriers_.size() < static_cast<std::size_t>(threads) + 1)
    barriers_ = std::vector<Barrier>(static_cast<std::size_t>(threads) + 1);
}

void Engine::check(const vit_images& images) const {
  const Shape& s = network_.shape;
  if (images.pixels != VIT_PIXELS_UINT8 && images.pixels != VIT_PIXELS_FLOAT32)
    invalid("images.pixels is " + std::to_string(images.pixels) + "; allowed are uint8 (0) and float32 (1)");
  if (images.layout != VIT_LAYOUT_NCHW && images.layout != VIT_LAYOUT_NHWC)
    invalid("images.layout is " + std::to_string(images.layout) + "; allowed are NCHW (0) and NHWC (1)");
  if (images.batch < 0) invalid("the batch is " + std::to_string(images.batch));
  if (max_batch_ && images.batch > max_batch_)
    invalid("the batch is " + std::to_string(images.batch) + ", the engine was made for at most " +
            std::to_string(max_batch_));
  if (images.channels != s.channels)
    invalid("images have " + std::to_string(images.channels) + " channels, the engine takes " +
            std::to_string(s.channels));
  const bool same = images.height == s.height && images.width == s.width;
  const auto up = [](int64_t size, int64_t patch) { return (size + patch - 1) / patch; };
  const bool fits = s.dynamic_pad && images.height > 0 && images.width > 0 &&
                    up(images.height, s.patch_height) == s.rows() && up(images.width, s.patch_width) == s.columns();
  if (!same && !fits)
    invalid("images are " + std::to_string(images.height) + " x " + std::to_string(images.width) +
            ", the engine takes " + std::to_string(s.height) + " x " + std::to_string(s.width));
  if (images.batch && !images.data) invalid("images.data is null");
}

// Checks one output and puts its address where the kernels look for it.
void Engine::place(const vit_output& output, int64_t batch, Forward& f) {
  const Shape& s = network_.shape;
  const int64_t tokens = s.pool == Pool::none ? s.N() : 1;
  const auto write_to = [&](float*& at, int64_t count) {
    if (output.count != batch * count)
      invalid("an output of kind " + std::to_string(output.kind) + " has room for " + std::to_string(output.count) +
              " floats; it takes " + std::to_string(batch * count));
    if (at) invalid("output kind " + std::to_string(output.kind) + " is asked for twice");
    if (!output.data && output.count) invalid("output.data is null");
    at = output.data;
  };
  const bool of_block = output.kind == VIT_OUTPUT_TOKENS || output.kind == VIT_OUTPUT_ATTENTION;
  if (of_block && (output.block < 0 || output.block >= s.depth))
    invalid("output.block is " + std::to_string(output.block) + "; the network has blocks 0 to " +
            std::to_string(s.depth - 1));
  if (output.kind == VIT_OUTPUT_ATTENTION && !s.prefix)
    invalid("attention rows of the class token are wanted, the network has none");
  switch (output.kind) {
    case VIT_OUTPUT_LOGITS:
      return write_to(f.logits, tokens * (s.classes ? s.classes : s.C));
    case VIT_OUTPUT_FEATURES:
      return write_to(f.features, tokens * s.C);
    case VIT_OUTPUT_TOKENS:
      return write_to(tokens_[static_cast<std::size_t>(output.block)], s.N() * s.C);
    case VIT_OUTPUT_ATTENTION:
      return write_to(attention_[static_cast<std::size_t>(output.block)], s.H * s.N());
    default:
      invalid("output.kind is " + std::to_string(output.kind) + "; see vit_output_kind");
  }
}

void Engine::forward(const vit_images& images, const vit_output* outputs, int64_t num_outputs, int threads) {
  if (threads < 0) invalid("num_threads is " + std::to_string(threads) + "; 0 means as many as allowed");
  threads = std::min(threads ? threads : default_threads(), kMaxThreads);
  check(images);
  const std::lock_guard<std::mutex> lock(mutex_);
  std::fill(tokens_.begin(), tokens_.end(), nullptr);
  std::fill(attention_.begin(), attention_.end(), nullptr);
  int64_t not_finite = images.batch;
  Forward f{};
  f.network = &network_;
  f.images = images.data;
  f.pixels = static_cast<Pixels>(images.pixels);
  f.channels_last = images.layout == VIT_LAYOUT_NHWC;
  f.B = images.batch, f.height = images.height, f.width = images.width;
  f.tokens = tokens_.data(), f.attention = attention_.data();
  f.first_not_finite = &not_finite;
  f.seconds = profiling_ ? seconds_ : nullptr;
  f.threads = threads;
  for (int64_t i = 0; i < num_outputs; ++i) place(outputs[i], images.batch, f);
  if (images.batch == 0) return;
  reserve(images.batch, threads);
  f.arena = arena_.data();
  f.barriers = barriers_.data();
  active_kernels().engine_forward(f);
  if (not_finite < images.batch)
    throw EngineError(kNotFinite, "vit engine: image " + std::to_string(not_finite) + " of " +
                                      std::to_string(images.batch) +
                                      " holds NaN or infinity; the outputs are undefined");
}

void Engine::profile(bool on) {
  const std::lock_guard<std::mutex> lock(mutex_);
  profiling_ = on;
  std::fill(std::begin(seconds_), std::end(seconds_), 0.0);
}

void Engine::profile_read(double* seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::copy(std::begin(seconds_), std::end(seconds_), seconds);
}

int default_threads() {
  cpu_set_t set;
  int threads =
      sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  // OpenMP does not know the quota of a container; more threads than it allows are stopped for parts of a second.
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    double quota = 0, period = 0;
    if (std::fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0)
      threads = std::min(threads, static_cast<int>(std::ceil(quota / period)));
    std::fclose(file);
  }
  return std::clamp(threads, 1, kMaxThreads);
}

}  // namespace vit::engine
