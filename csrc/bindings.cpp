// The only file that knows Python. Every function of ops.def takes the fields of its params struct, in the order of
// ops.def, as plain numbers: pointers as integers, strides behind their pointer, a workspace as address and bytes, a
// Context as its four fields. Compiled once per backend into vit._<backend>.
//
// A call returns None; or, before any work, the bytes of workspace it needs where fewer were given.
//
// pybind11 makes the module, the enumerations and their errors. The calls themselves are plain C functions of Python:
// its own dispatch would convert each of up to 45 numbers through a caster, and a small op is called in half a
// microsecond.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "vit.h"

namespace py = pybind11;
using namespace vit;

// A backend that is written op by op lacks some: weak, so that Python sees no function of that name.
namespace vit {
#define VIT_OP(name, Params, ...) __attribute__((weak)) void name(const Params&);
#define VIT_ROUTINE VIT_OP
#define VIT_WORKSPACE(name, Params) __attribute__((weak)) std::size_t name##_workspace(const Params&);
#include "ops.def"
}  // namespace vit

namespace {

// The enumerations once more, as types of this file alone: pybind11 makes one Python type of a C++ type in a process,
// and the modules of several backends are loaded into one.
namespace codes {
#define VIT_ENUMERATOR(key, code) key = code,
enum class DType : int32_t { VIT_DTYPES(VIT_ENUMERATOR) };
enum class Activation : int32_t { VIT_ACTIVATIONS(VIT_ENUMERATOR) };
enum class Pairing : int32_t { VIT_PAIRINGS(VIT_ENUMERATOR) };
#undef VIT_ENUMERATOR
}  // namespace codes

// How a field is read: `count` integers of 64 bits, or one value of another kind.
enum class Kind { pointer, integer, number, code, workspace, context };

struct Field {
  Kind kind;
  std::size_t offset;
  int count = 1;
};

// What a function of the contract is to Python; made when the module is loaded.
struct Function {
  const char* name;
  const char* names;  // of the fields, as ops.def lists them
  std::string doc;
  std::size_t size;
  std::vector<Field> fields;
  Py_ssize_t count = 0;  // numbers of one call
  void (*run)(const void* params);
  std::size_t (*workspace)(const void* params);  // null: needs none
  PyMethodDef method;
};

// Room for any params struct.
union Params {
#define VIT_OP(name, Params, ...) Params name##_params;
#define VIT_ROUTINE VIT_OP
#include "ops.def"
  Params() {}
};

void add(Function& f, std::size_t offset, const void* const&) { f.fields.push_back({Kind::pointer, offset}); }
void add(Function& f, std::size_t offset, void* const&) { f.fields.push_back({Kind::pointer, offset}); }
void add(Function& f, std::size_t offset, const int64_t&) { f.fields.push_back({Kind::integer, offset}); }
void add(Function& f, std::size_t offset, const double&) { f.fields.push_back({Kind::number, offset}); }
void add(Function& f, std::size_t offset, const DType&) { f.fields.push_back({Kind::code, offset}); }
void add(Function& f, std::size_t offset, const Activation&) { f.fields.push_back({Kind::code, offset}); }
void add(Function& f, std::size_t offset, const Pairing&) { f.fields.push_back({Kind::code, offset}); }
void add(Function& f, std::size_t offset, const Context&) { f.fields.push_back({Kind::context, offset}); }
void add(Function& f, std::size_t offset, const int64_t (&)[6]) { f.fields.push_back({Kind::integer, offset, 6}); }
void add_strided(Function& f, std::size_t offset, std::size_t strides, int count) {
  f.fields.push_back({Kind::pointer, offset});
  f.fields.push_back({Kind::integer, offset + strides, count});
}
void add(Function& f, std::size_t offset, const Matrix&) { add_strided(f, offset, offsetof(Matrix, batch), 3); }
void add(Function& f, std::size_t offset, const Heads&) { add_strided(f, offset, offsetof(Heads, batch), 3); }
void add(Function& f, std::size_t offset, const MutableHeads&) {
  add_strided(f, offset, offsetof(MutableHeads, batch), 3);
}
void add(Function& f, std::size_t offset, const View&) { add_strided(f, offset, offsetof(View, strides), 6); }

// The fields of a params struct in the order in which they are given.
template <class... Fields>
void add_all(Function& f, const void* params, const Fields&... fields) {
  (add(f, static_cast<std::size_t>(reinterpret_cast<const char*>(&fields) - static_cast<const char*>(params)), fields),
   ...);
}

void finish(Function& f) {
  if (f.workspace) f.fields[f.fields.size() - 2].kind = Kind::workspace;  // by ops.def the last but one
  for (const Field& field : f.fields)
    f.count += field.kind == Kind::context ? 4 : field.kind == Kind::workspace ? 2 : field.count;
  f.doc = std::string(f.name) + "(" + f.names + ")";
}

// The module is compiled without optimisation, which halves its compile time; what runs in every call is not.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O2")
#endif

// Releases Python's lock for a scope. At the end of the process Python ends a daemon thread that asks for the lock, by
// unwinding its stack (until 3.13): through a destructor or function that is noexcept, pybind11's among them, that
// would end the whole process with SIGABRT.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// A Python error is set.
struct PythonError {};

template <class T>
T checked(T value) {
  if (value == static_cast<T>(-1) && PyErr_Occurred()) throw PythonError();
  return value;
}

void* address(PyObject* number) {
  void* p = PyLong_AsVoidPtr(number);
  if (!p && PyErr_Occurred()) throw PythonError();
  return p;
}

int32_t small(PyObject* number) {
  const long long wide = checked(PyLong_AsLongLong(number));
  if (static_cast<int32_t>(wide) == wide) return static_cast<int32_t>(wide);
  PyErr_Format(PyExc_OverflowError, "%lld does not fit in 32 bits", wide);
  throw PythonError();
}

// Fills the struct at `params`; returns the bytes of its workspace.
std::size_t read(const Function& f, PyObject* const* next, char* params) {
  std::size_t workspace = 0;
  const Field* const end = f.fields.data() + f.fields.size();
  for (const Field* at = f.fields.data(); at != end; ++at) {
    const Field& field = *at;
    char* to = params + field.offset;
    switch (field.kind) {
      case Kind::pointer:
        *reinterpret_cast<void**>(to) = address(*next++);
        break;
      case Kind::integer:
        for (int i = 0; i < field.count; ++i)
          reinterpret_cast<int64_t*>(to)[i] = checked<long long>(PyLong_AsLongLong(*next++));
        break;
      case Kind::number:
        *reinterpret_cast<double*>(to) = checked(PyFloat_AsDouble(*next++));
        break;
      case Kind::code:
        *reinterpret_cast<int32_t*>(to) = small(*next++);
        break;
      case Kind::workspace:
        *reinterpret_cast<void**>(to) = address(*next++);
        workspace = static_cast<std::size_t>(checked<long long>(PyLong_AsLongLong(*next++)));
        break;
      case Kind::context: {
        auto& context = *reinterpret_cast<Context*>(to);
        context.stream = address(*next++);
        context.device = small(*next++);
        context.num_threads = small(*next++);
        context.allow_tf32 = checked(PyObject_IsTrue(*next++)) != 0;
        break;
      }
    }
  }
  return workspace;
}

// What `work` returns, or null and a Python error.
template <class Work>
PyObject* guarded(const Work& work) {
  try {
    return work();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

#include "repeat.h"

PyObject* run(const Function& f, PyObject* const* arguments, Py_ssize_t count) {
  if (count != f.count) {
    PyErr_Format(PyExc_TypeError, "%s takes %zd numbers, %zd were given", f.name, f.count, count);
    throw PythonError();
  }
  Params params;
  std::memset(static_cast<void*>(&params), 0, f.size);
  const std::size_t given = read(f, arguments, reinterpret_cast<char*>(&params));
  if (f.workspace) {
    const std::size_t needed = f.workspace(&params);
    if (needed > given) return PyLong_FromSize_t(needed);
  }
  {
    const WithoutGil without_gil;
    f.run(&params);
  }
  heard().hear(f, params);
  Py_RETURN_NONE;
}

// One for all functions: which one it is stands in the capsule that Python hands over as self.
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return guarded(
      [&] { return run(*static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr)), arguments, count); });
}

template <class P, void (*kernel)(const P&)>
void run_as(const void* params) {
  kernel(*static_cast<const P*>(params));
}
template <class P, std::size_t (*workspace)(const P&)>
std::size_t bytes_as(const void* params) {
  return workspace(*static_cast<const P*>(params));
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

std::vector<Function> functions() {
  std::vector<Function> all;
#define VIT_OP(op, P, ...)                                                                     \
  if (&vit::op != nullptr) {                                                                   \
    struct Lister : P {                                                                        \
      void list(Function& f) { add_all(f, static_cast<P*>(this), __VA_ARGS__); }               \
    };                                                                                         \
    Lister lister = {};                                                                        \
    all.push_back({#op, #__VA_ARGS__, "", sizeof(P), {}, 0, run_as<P, vit::op>, nullptr, {}}); \
    lister.list(all.back());                                                                   \
  }
#define VIT_ROUTINE VIT_OP
#define VIT_WORKSPACE(op, P) \
  for (Function& f : all)    \
    if (std::string_view(f.name) == #op) f.workspace = bytes_as<P, vit::op##_workspace>;
#include "ops.def"
  return all;
}

}  // namespace

PYBIND11_MODULE(VIT_MODULE, m) {
  m.attr("contract") = kContract;
  m.def(
      "info",
      [] {
        py::list facts;
        for (const auto& [key, value] : info()) facts.append(py::make_tuple(key, value));
        return facts;
      },
      "What this build is and what it found on this machine: [(name, value), ...]");
  m.def("listen", [] { heard().listen(); }, "From now on, the kernels called on this thread are counted for `learn`.");
  m.def("repeats", make_repeats,
        "(again, learn) for the calls of one op, or None where DLPack's interface is another; see repeat.h.");

#define VIT_VALUE(key, code) .value(#key, Enum::key)
  {
    using Enum = codes::DType;
    py::native_enum<Enum>(m, "DType", "enum.IntEnum") VIT_DTYPES(VIT_VALUE).finalize();
  }
  {
    using Enum = codes::Activation;
    py::native_enum<Enum>(m, "Activation", "enum.IntEnum") VIT_ACTIVATIONS(VIT_VALUE).finalize();
  }
  {
    using Enum = codes::Pairing;
    py::native_enum<Enum>(m, "Pairing", "enum.IntEnum") VIT_PAIRINGS(VIT_VALUE).finalize();
  }

  // Of this module as long as the process lives.
  static std::vector<Function> all = functions();
  py::dict fields;
  for (Function& f : all) {
    finish(f);
    const auto function = reinterpret_cast<void (*)()>(call);  // METH_FASTCALL says what it is
    f.method = {f.name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, f.doc.c_str()};
    m.add_object(f.name, py::reinterpret_steal<py::object>(
                             PyCFunction_NewEx(&f.method, py::capsule(&f).release().ptr(), nullptr)));
    fields[f.name] = py::str(f.names).attr("split")(", ");
  }
  m.attr("fields") = fields;
}
