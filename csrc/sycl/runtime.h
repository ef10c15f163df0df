// The SYCL side of a call: which device it runs on, the kernels compiled for that device, and the memory they may read.
//
// Kernels are compiled at run time, by SYCL's own compiler, from the files of kernels/ (embedded as text by CMake): one
// bundle per family and combination of dtypes, when it is first needed, kept on disk between processes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <sycl/sycl.hpp>
#include <utility>
#include <vector>

#include "kernels/sizes.h"
#include "vit.h"

namespace vit::device {

// What differs between devices without changing any result but its last digits.
struct Variant {
  int lanes = 16;           // work-items of a sub-group
  int sub_groups = 1;       // per work-group
  bool local = false;       // a work-group's sub-groups share the b of products in local memory
  bool staged = false;      // host memory is copied to the device and back, not used in place
  bool whole_heads = true;  // a few sub-groups fill the device: each takes whole heads of attention in the backward
};

// A family of kernels that are compiled together: header, and the template instances for its dtypes.
struct Family {
  int id;
  const char* header;
  std::vector<std::string> (*kernels)(const std::vector<DType>&);
};

struct Device;
struct Bundle {
  std::vector<sycl::kernel> kernels;  // in the order of Family::kernels
};

// One call of an op. Memory of the caller is named once by in(), out() or scratch(), which return the address that
// kernels use; finish() waits where the caller's memory is the host's, and brings staged results back.
class Call {
 public:
  Call(const char* op, const Context&);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  template <class T = void>
  const T* in(const void* p, int64_t elements, std::size_t size) {
    return static_cast<const T*>(staged_in(p, elements, size));
  }
  void* out(void* p, int64_t elements, std::size_t size);
  void* inout(void* p, int64_t elements, std::size_t size);  // for memory that is written in part
  void* scratch(void* workspace, std::size_t bytes);

  const Bundle& bundle(const Family&, const std::vector<DType>&);
  const Variant& variant() const;

  // Runs kernel `index` of a bundle on at least `units` sub-groups.
  template <class... Args>
  void launch(const Bundle& bundle, int index, int64_t units, Args... args) {
    if (units <= 0) return;
    const std::size_t local = static_cast<std::size_t>(variant().lanes) * variant().sub_groups;
    const std::size_t groups = static_cast<std::size_t>((units + variant().sub_groups - 1) / variant().sub_groups);
    submit([&](sycl::handler& h) {
      int i = 0;
      (h.set_arg(i++, args), ...);
      h.parallel_for(sycl::nd_range<1>{{groups * local}, {local}}, bundle.kernels[static_cast<std::size_t>(index)]);
    });
  }

  void finish();

 private:
  template <class F>
  void submit(const F& f) {
    try {
      queue_->submit(f);
    } catch (const sycl::exception& e) {
      fail(e.what());
    }
  }
  [[noreturn]] void fail(const std::string& what) const;
  const void* staged_in(const void* p, int64_t elements, std::size_t size);

  struct Copy {
    void* device;
    void* host;  // where it goes back to, null: nowhere
    std::size_t bytes;
  };
  const char* op_;
  Device* device_;
  sycl::queue* queue_;
  bool host_memory_;  // the call has no stream: its tensors are the host's
  bool staged_;
  std::vector<Copy> copies_;
};

// Sub-groups that keep the device busy when each works off many tasks. Looks at the device, never at the data.
int64_t persistent_units(const Context&, int64_t tasks);

const Variant& variant_of(const Context&);

// ----- shared by the ops

const char* type_name(DType);
DType accumulator(DType);
std::size_t size_of(DType);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out aligned parts of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  char* take(int64_t bytes) {
    char* part = base ? base + used : nullptr;
    used += ceil_div(bytes, 64) * 64;
    return part;
  }
};

}  // namespace vit::device
