#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <set>

#include "engine/config.h"
#include "engine/executor.h"

namespace vit::engine {
namespace {

// The engines of this process, so that a forked child can free their locks. Never destroyed: at the end of a process
// threads may still be at work.
struct Registry {
  std::mutex mutex;
  std::set<Engine*> engines;
};

Registry& registry() {
  static Registry& only = *[] {
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] {
                     for (Engine* engine : registry().engines) engine->after_fork();
                     registry().mutex.unlock();
                   });
    return new Registry;
  }();
  return only;
}

// True for the time of a scope.
class Flag {
 public:
  explicit Flag(std::atomic<bool>& flag) : flag_(flag) { flag_ = true; }
  Flag(const Flag&) = delete;
  Flag& operator=(const Flag&) = delete;
  ~Flag() { flag_ = false; }

 private:
  std::atomic<bool>& flag_;
};

}  // namespace

Engine::Engine(const vit_engine_config& config, int64_t max_batch) : config_(config), max_batch_(max_batch) {
  if (max_batch < 0) invalid("max_batch is " + std::to_string(max_batch) + "; 0 means no limit");
  check_config(config);
  network_.shape = shape_of(config);
  blocks_.resize(static_cast<std::size_t>(config.depth));
  tokens_.resize(blocks_.size());
  attention_.resize(blocks_.size());
  pool_values_.resize(static_cast<std::size_t>(config.pool_heads));
  network_.blocks = blocks_.data();
  network_.pool.values = pool_values_.data();
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().engines.insert(this);
}

Engine::~Engine() {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().engines.erase(this);
}

void Engine::after_fork() {
  new (&mutex_) std::mutex;
  if (!changing_) return;
  changing_ = false;
  new (&arena_) Mapping;  // half changed, perhaps: left alone, not given back
}

const char* Engine::text(const std::string& key) const {
  const auto found = texts_.find(key);
  return found == texts_.end() ? nullptr : found->second.c_str();
}

void Engine::reserve(const Network& network, int64_t batch, int threads) {
  const auto bytes = static_cast<std::size_t>(engine::arena_bytes(network, batch, threads));
  if (bytes > arena_.size()) {
    arena_ = Mapping();  // first, so that never both are there
    arena_ = Mapping::anonymous(bytes, "intermediate results");
  }
}

// The network for images of another size: the weights are the same.
Network Engine::of_grid(const vit_grid& grid) const {
  vit_engine_config config = config_;
  config.image_height = grid.height, config.image_width = grid.width;
  check_config(config);
  Network n = network_;
  Shape& s = n.shape;
  s.height = grid.height, s.width = grid.width;
  const auto check = [](const char* name, const float* given, int64_t count, int64_t wanted) {
    if (count != wanted || (wanted && !given))
      invalid("grid." + std::string(name) + " has " + std::to_string(given ? count : 0) +
              " values; images of that size " + "take " + std::to_string(wanted));
  };
  check("positions", grid.positions, grid.num_positions, s.patches() * s.C);
  const bool turns = s.rotary != Rotary::none;
  check("rotary", grid.rotary, grid.num_rotary, turns ? s.rotary_tables() * s.patches() * 2 * s.D() : 0);
  n.positions = const_cast<float*>(grid.positions);  // no kernel writes to it
  n.rotary = const_cast<float*>(grid.rotary);
  return n;
}

void Engine::check(const vit_images& images, const Shape& s) const {
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
  // Between the whole patches that all rows but the last have, and all rows.
  const auto padded_to = [](int64_t size, int64_t patch, int64_t count) {
    return size > (count - 1) * patch && size <= count * patch;
  };
  const bool fits = s.dynamic_pad && padded_to(images.height, s.patch_height, s.rows()) &&
                    padded_to(images.width, s.patch_width, s.columns());
  if (!same && !fits)
    invalid("images are " + std::to_string(images.height) + " x " + std::to_string(images.width) +
            ", the engine takes " + std::to_string(s.height) + " x " + std::to_string(s.width));
  int64_t bytes = images.pixels == VIT_PIXELS_FLOAT32 ? sizeof(float) : 1;
  for (const int64_t size : {images.batch, images.channels, images.height, images.width})
    if (__builtin_mul_overflow(bytes, size, &bytes))
      invalid("the batch is " + std::to_string(images.batch) + "; no memory holds so many images");
  if (images.batch && !images.data) invalid("images.data is null");
}

// Checks one output and puts its address where the kernels look for it.
void Engine::place(const vit_output& output, int64_t batch, Forward& f) {
  const Shape& s = f.network->shape;
  const int64_t tokens = s.pool == Pool::none ? s.N() : 1;
  const auto write_to = [&](float*& at, int64_t count) {
    int64_t wanted = 0;
    if (__builtin_mul_overflow(batch, count, &wanted))
      invalid("the batch is " + std::to_string(batch) + "; no memory holds so many outputs");
    if (output.count != wanted)
      invalid("an output of kind " + std::to_string(output.kind) + " has room for " + std::to_string(output.count) +
              " floats; it takes " + std::to_string(wanted));
    if (at) invalid("output kind " + std::to_string(output.kind) + " is asked for twice");
    if (!output.data && output.count) invalid("output.data is null");
    at = output.data;
  };
  const bool of_block = output.kind == VIT_OUTPUT_TOKENS || output.kind == VIT_OUTPUT_ATTENTION;
  if (of_block && (output.block < 0 || output.block >= s.depth))
    invalid("output.block is " + std::to_string(output.block) + "; the network has blocks 0 to " +
            std::to_string(s.depth - 1));
  if (output.kind == VIT_OUTPUT_ATTENTION && !s.prefix)
    invalid("attention rows of the first token are wanted, and the network has none before its patches");
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

void Engine::forward(const vit_images& images, const vit_grid* grid, const vit_output* outputs, int64_t num_outputs,
                     int threads) {
  if (threads < 0) invalid("num_threads is " + std::to_string(threads) + "; 0 means as many as allowed");
  threads = std::min(threads ? threads : default_threads(), kMaxThreads);
  if (num_outputs < 0) invalid("num_outputs is " + std::to_string(num_outputs));
  const Network network = grid ? of_grid(*grid) : network_;
  check(images, network.shape);
  const std::lock_guard<std::mutex> lock(mutex_);
  const Flag changing(changing_);
  std::fill(tokens_.begin(), tokens_.end(), nullptr);
  std::fill(attention_.begin(), attention_.end(), nullptr);
  int64_t not_finite = images.batch;
  Forward f{};
  f.network = &network;
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
  reserve(network, images.batch, threads);
  f.arena = arena_.data();
#ifdef VIT_FILL_ARENA
  // Of the fuzzing: what an earlier forward left behind, here NaN or zeros in turn, must not reach a result.
  static std::atomic<unsigned> calls{0};
  std::memset(arena_.data(), calls++ % 2 ? 0 : 0xff, arena_.size());
#endif
  run(f);
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

}  // namespace vit::engine
