// Engine files: one safetensors file (8 bytes of header length, a JSON header, the tensors), whose packed weights are
// used where they lie. Every tensor starts on a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace vit::engine {

struct Record {
  std::string name, dtype;  // "F32", "BF16", "I8", "I32", "U16", "U8"
  int64_t begin, end;       // bytes from the end of the header
};

using Texts = std::map<std::string, std::string>;

struct Header {
  Texts texts;  // __metadata__
  std::map<std::string, Record> records;
  std::size_t bytes = 0;  // where the tensors begin
};

// The length, the header and its padding, in all a multiple of 64 bytes.
std::string write_header(const Texts& texts, const std::vector<Record>& records);

// The inverse, for a whole file in memory; throws EngineError naming `path` for anything else than a safetensors file
// whose tensors lie inside it.
Header read_header(const char* data, std::size_t size, const std::string& path);

// Bytes of an element of a safetensors dtype; 0 for an unknown one.
int64_t element_size(const std::string& dtype);

}  // namespace vit::engine
