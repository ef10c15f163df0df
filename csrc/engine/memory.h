// Memory that lies on pages of its own: anonymous, with huge pages advised, or a file mapped for reading.
#pragma once

#include <cstddef>
#include <string>

namespace vit::engine {

class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Mapping();

  // Zeroed memory on a 2 MiB boundary; throws EngineError, which says how much `what` needs.
  static Mapping anonymous(std::size_t bytes, const char* what);
  // A whole file; throws EngineError.
  static Mapping file(const std::string& path);

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void swap(Mapping& other) noexcept;

  char* data_ = nullptr;
  std::size_t size_ = 0;
  void* mapped_ = nullptr;  // what munmap takes
  std::size_t mapped_size_ = 0;
};

}  // namespace vit::engine
