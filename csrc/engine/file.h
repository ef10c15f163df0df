// Engine files: one safetensors file (8 bytes of header length, a JSON header, the tensors), whose packed weights are
// used where they lie. Every tensor starts on a cache line, and behind the one before it. The texts hold a CRC-32C of
// each tensor, in the order of the data, and one of the whole header.
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
  Texts texts;                  // __metadata__
  std::vector<Record> records;  // in the order of the data
  std::size_t bytes = 0;        // where the tensors begin
  bool intact = false;          // its checksum is there and right
};

inline constexpr const char* kDataChecksums = "crc32c";
inline constexpr const char* kHeaderChecksum = "crc32c header";

// The length, the header and its padding, in all a multiple of 64 bytes. Checksums of the data may be placeholders:
// its length does not depend on their values.
std::string write_header(Texts texts, const std::vector<Record>& records, const std::vector<uint32_t>& checksums);

// Bytes of the header of a file that begins with `start`, at least 8 bytes where it has them; throws EngineError naming
// `path` for what cannot be a safetensors file of `size` bytes.
std::size_t header_bytes(const std::string& start, std::size_t size, const std::string& path);

// The inverse of write_header, for the header alone, of a file of `size` bytes; throws EngineError for anything else
// than safetensors whose tensors fill the rest of the file without gaps and overlaps.
Header read_header(const std::string& bytes, std::size_t size, const std::string& path);

// The first tensor whose data, behind the header in `file`, are not those of its checksum; null when all are.
const Record* damaged(const Header& header, const char* file);

// The checksums of tensors whose data begin at `data`.
std::vector<uint32_t> checksums_of(const std::vector<Record>& records, const char* data);

// Bytes of an element of a safetensors dtype; 0 for an unknown one.
int64_t element_size(const std::string& dtype);

}  // namespace vit::engine
