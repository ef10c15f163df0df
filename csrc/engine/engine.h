// An engine: packed weights, memory for intermediate results, and the checks in front of the kernels.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/error.h"
#include "engine/file.h"
#include "engine/memory.h"
#include "engine/network.h"

namespace vit::engine {

// Whether an engine has the weights of its file in memory of its own or where the system has the file.
enum class Access { copy, map };

class Engine {
 public:
  // Both throw EngineError or std::bad_alloc.
  static std::unique_ptr<Engine> open(const std::string& path, int64_t max_batch, Access access);
  static std::unique_ptr<Engine> build(const vit_engine_config& config, const vit_tensor* tensors, int64_t num_tensors,
                                       const Texts& texts, int64_t max_batch);

  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();

  void save(const std::string& path) const;
  // grid: null for images of the engine's own size.
  void forward(const vit_images& images, const vit_grid* grid, const vit_output* outputs, int64_t num_outputs,
               int threads);

  const vit_engine_config& config() const { return config_; }
  const char* text(const std::string& key) const;
  int64_t weight_bytes() const { return static_cast<int64_t>(image_.size()); }
  int64_t arena_bytes() const { return static_cast<int64_t>(arena_.size()); }

  void profile(bool on);
  void profile_read(double* seconds);

  // In a forked child, whose only thread is the one that forked: a call that another thread was in never ends there.
  void after_fork();

 private:
  Engine(const vit_engine_config& config, int64_t max_batch);

  void reserve(const Network& network, int64_t batch, int threads);
  Network of_grid(const vit_grid& grid) const;
  void check(const vit_images& images, const Shape& shape) const;
  void place(const vit_output& output, int64_t batch, Forward& forward);

  vit_engine_config config_;
  int64_t max_batch_;  // 0: no limit
  Texts texts_;
  Network network_{};
  std::vector<Block> blocks_;
  std::vector<Linear> pool_values_;
  Mapping image_;  // the bytes of the engine file
  Mapping arena_;

  std::mutex mutex_;                        // one forward at a time
  std::atomic<bool> changing_{false};       // a forward is changing what follows, and arena_
  std::vector<float*> tokens_, attention_;  // of each block: where the current forward wants them
  bool profiling_ = false;
  double seconds_[kPhases] = {};
};

}  // namespace vit::engine
