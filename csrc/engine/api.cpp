// vit_engine.h on top of engine.h: exceptions become a status and a text of the calling thread.
#include <new>

#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/names.h"

using vit::engine::Access;
using vit::engine::Engine;
using vit::engine::EngineError;
using vit::engine::Texts;

struct vit_engine {
  std::unique_ptr<Engine> engine;
};

namespace {

thread_local std::string last_error;
thread_local int last_status = VIT_OK;

int fail(vit_status status, const std::string& text) {
  last_error = text;
  return last_status = status;
}

template <class F>
int guarded(const F& f) {
  try {
    f();
    return VIT_OK;
  } catch (const EngineError& error) {
    return fail(error.status, error.what());
  } catch (const vit::Error& error) {
    return fail(VIT_INVALID, error.what());
  } catch (const std::bad_alloc&) {
    return fail(VIT_MEMORY, "vit engine: out of memory");
  } catch (const std::exception& error) {
    return fail(VIT_FAILED, "vit engine: " + std::string(error.what()));
  }
}

template <class F>
vit_engine* made(const F& make) {
  vit_engine* handle = nullptr;
  guarded([&] { handle = new vit_engine{make()}; });
  return handle;
}

void require(bool given, const char* name) {
  if (!given) throw EngineError(VIT_INVALID, "vit engine: " + std::string(name) + " is null");
}

void require_array(const void* array, int64_t count, const std::string& name) {
  if (count < 0) throw EngineError(VIT_INVALID, "vit engine: num_" + name + " is " + std::to_string(count));
  if (count > 0 && !array) throw EngineError(VIT_INVALID, "vit engine: " + name + " is null");
}

static_assert(vit::engine::kPhases == VIT_PHASES);

}  // namespace

extern "C" {

vit_engine* vit_engine_create(const char* path, int64_t max_batch) {
  return made([&] {
    require(path, "path");
    return Engine::open(path, max_batch, Access::copy);
  });
}

vit_engine* vit_engine_map(const char* path, int64_t max_batch) {
  return made([&] {
    require(path, "path");
    return Engine::open(path, max_batch, Access::map);
  });
}

vit_engine* vit_engine_build(const vit_engine_config* config, const vit_tensor* tensors, int64_t num_tensors,
                             const vit_text* texts, int64_t num_texts, int64_t max_batch) {
  return made([&] {
    require(config, "config");
    require_array(tensors, num_tensors, "tensors");
    require_array(texts, num_texts, "texts");
    Texts kept;
    for (int64_t i = 0; i < num_texts; ++i) {
      require(texts[i].key && texts[i].value, "key or value of a text");
      kept[texts[i].key] = texts[i].value;
    }
    return Engine::build(*config, tensors, num_tensors, kept, max_batch);
  });
}

int vit_engine_save(const vit_engine* engine, const char* path) {
  return guarded([&] {
    require(engine, "engine");
    require(path, "path");
    engine->engine->save(path);
  });
}

int vit_engine_forward(vit_engine* engine, const vit_images* images, const vit_output* outputs, int64_t num_outputs,
                       int32_t num_threads) {
  return guarded([&] {
    require(engine, "engine");
    require(images, "images");
    require_array(outputs, num_outputs, "outputs");
    engine->engine->forward(*images, nullptr, outputs, num_outputs, num_threads);
  });
}

int vit_engine_forward_grid(vit_engine* engine, const vit_images* images, const vit_grid* grid,
                            const vit_output* outputs, int64_t num_outputs, int32_t num_threads) {
  return guarded([&] {
    require(engine, "engine");
    require(images, "images");
    require(grid, "grid");
    require_array(outputs, num_outputs, "outputs");
    engine->engine->forward(*images, grid, outputs, num_outputs, num_threads);
  });
}

void vit_engine_destroy(vit_engine* engine) { delete engine; }

const char* vit_engine_last_error(void) { return last_error.c_str(); }
int vit_engine_last_status(void) { return last_status; }

int vit_engine_get_config(const vit_engine* engine, vit_engine_config* config) {
  return guarded([&] {
    require(engine, "engine");
    require(config, "config");
    *config = engine->engine->config();
  });
}

const char* vit_engine_text(const vit_engine* engine, const char* key) {
  const char* text = nullptr;
  guarded([&] {
    require(engine, "engine");
    require(key, "key");
    text = engine->engine->text(key);
  });
  return text;
}

int vit_engine_memory(const vit_engine* engine, int64_t* weights, int64_t* intermediate) {
  return guarded([&] {
    require(engine, "engine");
    if (weights) *weights = engine->engine->weight_bytes();
    if (intermediate) *intermediate = engine->engine->arena_bytes();
  });
}

int32_t vit_engine_default_threads(void) {
  int32_t threads = 1;
  guarded([&] { threads = vit::engine::default_threads(); });
  return threads;
}

int vit_engine_profile(vit_engine* engine, int32_t on) {
  return guarded([&] {
    require(engine, "engine");
    engine->engine->profile(on != 0);
  });
}

int vit_engine_profile_read(vit_engine* engine, double seconds[VIT_PHASES]) {
  return guarded([&] {
    require(engine, "engine");
    require(seconds, "seconds");
    engine->engine->profile_read(seconds);
  });
}

const char* vit_engine_phase_name(int32_t phase) {
  return phase >= 0 && phase < VIT_PHASES ? vit::engine::kPhaseNames[phase] : nullptr;
}

int vit_engine_name(int32_t index, vit_name* name) {
  return guarded([&] {
    require(name, "name");
    *name = vit::engine::name_at(index);
  });
}

}  // extern "C"
