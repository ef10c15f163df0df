// What a backend provides to the engine: everything that knows the device. Files, memory, checks and the C interface
// stand on these functions alone; a library holds those of one backend.
#pragma once

#include "engine/network.h"

namespace vit::engine {

// What packed weights are made for, as engine files say it: the instruction-set level of a CPU.
const char* level();

inline constexpr int kMaxThreads = 1024;  // of one forward

// Threads this process may use, at most kMaxThreads, and of those the ones that other work leaves free.
int available_threads();
int default_threads();

// Bytes of a packed matrix, and packing one.
int64_t packed_bytes(const Linear&);
void pack(const Packing&);

// Bytes of the memory for intermediate results of one forward, and the forward.
int64_t arena_bytes(const Network&, int64_t B, int threads);
void run(const Forward&);

}  // namespace vit::engine
