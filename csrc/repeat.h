// Calls that were made before; a part of bindings.cpp.
//
// What a launcher in Python finds out about its arguments (do they fit, sizes, strides, codes) follows from their
// dtypes and shapes. A second call of the same kind has other pointers, and maybe other threads and scratch memory: so
// the params struct of the first is kept, and a repeated call fills in the rest (docs/design.md, "Path of one batch").
//
// Tensors are read through DLPack's exchange interface, a table of C functions that PyTorch has from version 2.10 on.
#pragma once

// Of DLPack 1: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  char* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};
struct DLExchange {
  uint32_t major, minor;
  void *older, *allocate, *give, *take;
  int (*read)(void* object, DLTensor* to);
  void* stream;
};
constexpr int32_t kDLCPU = 1;

// The kernels that ran on this thread since `listen`: how many, and the last one.
struct Heard {
  bool listening = false;
  int calls = 0;
  const Function* function = nullptr;
  Params params;

  void listen() {
    listening = true;
    calls = 0;
  }
  void hear(const Function& f, const Params& given) {
    if (!listening) return;
    ++calls;
    function = &f;
    params = given;
  }
};

Heard& heard() {
  static thread_local Heard of_thread;
  return of_thread;
}

// Memory of a tensor: its first byte, and the first one behind it.
struct Extent {
  char *begin, *end;
  bool holds(const char* p) const { return begin <= p && p < end; }
};

// The arguments of one call: the key of its kind, and where its tensors are.
struct Arguments {
  std::array<int64_t, 128> key;
  std::array<Extent, 8> tensors;
  std::size_t size = 0, count = 0;
  uint64_t hash = 0;
  bool graded = false;  // whether autograd looks on
  bool fit = true;      // whether such a call may be repeated

  void add(int64_t value) {
    if (size == key.size()) fit = false;
    if (!fit) return;
    key[size++] = value;
    hash = (hash ^ static_cast<uint64_t>(value)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  void add(Extent tensor) {
    if (count == tensors.size()) fit = false;
    if (fit) tensors[count++] = tensor;
  }
};

// A field of the params struct that points `bytes` into an argument's memory, or into the result's (behind the last).
struct Pointer {
  std::size_t offset, tensor;
  int64_t bytes;
};

// What is kept of the first call of a kind.
struct Repeatable {
  std::vector<int64_t> key;
  uint64_t hash;
  std::vector<py::object> names;       // the strings among the arguments, whose addresses the key has
  const Function* function = nullptr;  // null: such calls are launched each time
  Params params;
  std::vector<Pointer> pointers;
  py::object like;  // the result is torch.empty_like of it
};

// The calls of one op.
struct Repeats {
  const DLExchange* exchange;
  py::object tensor, parameter;  // the types whose memory may be read
  py::tuple watchers;            // functions: nothing is repeated while one of them says yes
  py::object grad_enabled, threads, empty_like;
  py::str is_neg, requires_grad;  // names
  std::vector<std::shared_ptr<const Repeatable>> known;

  static constexpr std::size_t kMost = 64;  // then all are forgotten: images of ever new sizes

  DLTensor read(PyObject* object) const {
    DLTensor found;
    if (exchange->read(object, &found) != 0) throw PythonError();
    found.data += found.byte_offset;
    return found;
  }
  void add(Arguments& a, PyObject* object) const;
  void add_tensor(Arguments& a, PyObject* object) const;
  Arguments arguments(PyObject* given) const;
  std::shared_ptr<const Repeatable> find(const Arguments& a) const;
  PyObject* again(PyObject* given, PyObject* scratch) const;
  void learn(PyObject* given, PyObject* result, PyObject* like);
};

// Whether a new object, or null with a Python error, is true.
bool answer(PyObject* object) {
  if (!object) throw PythonError();
  const int truth = PyObject_IsTrue(object);
  Py_DECREF(object);
  return checked(truth) != 0;
}

Extent extent(const DLTensor& t) {
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.strides[i];
  return {t.data, t.data + (last + 1) * (t.bits / 8)};
}

void Repeats::add_tensor(Arguments& a, PyObject* object) const {
  if (a.graded && answer(PyObject_GetAttr(object, requires_grad.ptr()))) a.fit = false;
  if (!a.fit) return;
  const DLTensor t = read(object);
  int64_t elements = 1;
  a.add(int64_t{t.code} << 32 | int64_t{t.bits} << 16 | t.ndim);
  for (int i = 0; i < t.ndim; ++i) {
    a.add(t.shape[i]);
    a.add(t.strides[i]);
    elements *= t.shape[i];
  }
  a.fit = a.fit && t.device_type == kDLCPU && t.lanes == 1 && elements > 0 && t.data;
  a.add(extent(t));
}

void Repeats::add(Arguments& a, PyObject* object) const {
  PyTypeObject* const type = Py_TYPE(object);
  a.add(reinterpret_cast<int64_t>(type));
  if (type == reinterpret_cast<PyTypeObject*>(tensor.ptr())) {
    // The imaginary part of a conjugated tensor is a view whose sign only PyTorch turns.
    if (answer(PyObject_CallMethodNoArgs(object, is_neg.ptr()))) a.fit = false;
    add_tensor(a, object);
  } else if (type == reinterpret_cast<PyTypeObject*>(parameter.ptr())) {
    add_tensor(a, object);
  } else if (object == Py_None || type == &PyBool_Type || type == &PyUnicode_Type) {
    a.add(reinterpret_cast<int64_t>(object));
  } else if (type == &PyLong_Type) {
    a.add(checked<long long>(PyLong_AsLongLong(object)));
  } else if (type == &PyFloat_Type) {
    int64_t bits;
    const double value = PyFloat_AS_DOUBLE(object);
    std::memcpy(&bits, &value, sizeof bits);
    a.add(bits);
  } else {
    a.fit = false;
  }
}

Arguments Repeats::arguments(PyObject* given) const {
  Arguments a;
  try {
    a.graded = answer(PyObject_CallNoArgs(grad_enabled.ptr()));
    a.add(PyTuple_GET_SIZE(given));
    for (Py_ssize_t i = 0; a.fit && i < PyTuple_GET_SIZE(given); ++i) add(a, PyTuple_GET_ITEM(given, i));
  } catch (const PythonError&) {  // a tensor without memory, or a number of more than 64 bits: the launcher's affair
    PyErr_Clear();
    a.fit = false;
  }
  return a;
}

std::shared_ptr<const Repeatable> Repeats::find(const Arguments& a) const {
  for (const auto& r : known)
    if (r->hash == a.hash && r->key.size() == a.size && std::equal(r->key.begin(), r->key.end(), a.key.begin()))
      return r;
  return nullptr;
}

// The result of a call that is known. None where its kind is new; False where it has to be launched each time.
PyObject* Repeats::again(PyObject* given, PyObject* scratch) const {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers.ptr()); ++i)
    if (answer(PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers.ptr(), i)))) Py_RETURN_FALSE;
  const Arguments a = arguments(given);
  if (!a.fit) Py_RETURN_FALSE;
  const std::shared_ptr<const Repeatable> call = find(a);  // another thread may make it forgotten
  if (!call) Py_RETURN_NONE;
  if (!call->function) Py_RETURN_FALSE;
  const Function& f = *call->function;
  Params params;
  std::memcpy(static_cast<void*>(&params), &call->params, f.size);
  char* const fields = reinterpret_cast<char*>(&params);
  const auto count = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(threads.ptr()));
  if (!count) throw PythonError();
  reinterpret_cast<Context*>(fields + f.fields.back().offset)->num_threads = small(count.ptr());
  if (f.workspace) {
    *reinterpret_cast<void**>(fields + f.fields[f.fields.size() - 2].offset) = address(PyTuple_GET_ITEM(scratch, 0));
    const std::size_t held = checked<std::size_t>(PyLong_AsSize_t(PyTuple_GET_ITEM(scratch, 1)));
    if (f.workspace(&params) > held) Py_RETURN_FALSE;
  }
  auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(empty_like.ptr(), call->like.ptr()));
  if (!result) throw PythonError();
  char* const made = read(result.ptr()).data;
  for (const Pointer& p : call->pointers)
    *reinterpret_cast<char**>(fields + p.offset) = (p.tensor < a.count ? a.tensors[p.tensor].begin : made) + p.bytes;
  {
    const WithoutGil without_gil;
    f.run(&params);
  }
  return result.release().ptr();
}

// Which memory each pointer of a call is in; false unless it is the memory of exactly one tensor.
bool locate(const Function& f, const Params& params, const Arguments& a, std::vector<Pointer>& found) {
  for (const Field& field : f.fields) {
    if (field.kind != Kind::pointer) continue;  // codes are not aligned as pointers are
    char* const at = *reinterpret_cast<char* const*>(reinterpret_cast<const char*>(&params) + field.offset);
    if (!at) continue;
    const Extent* const end = a.tensors.data() + a.count;
    const auto holds = [&](const Extent& t) { return t.holds(at); };
    if (std::count_if(a.tensors.data(), end, holds) != 1) return false;
    const Extent* const in = std::find_if(a.tensors.data(), end, holds);
    found.push_back({field.offset, static_cast<std::size_t>(in - a.tensors.data()), at - in->begin});
  }
  return true;
}

// Keeps a call that has been launched since `listen`, with its result; `like`: None where it may not be repeated.
void Repeats::learn(PyObject* given, PyObject* result, PyObject* like) {
  Heard& h = heard();
  h.listening = false;
  Arguments a = arguments(given);
  if (!a.fit) return;
  auto call = std::make_shared<Repeatable>();
  call->key.assign(a.key.begin(), a.key.begin() + a.size);
  call->hash = a.hash;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i)
    if (PyUnicode_CheckExact(PyTuple_GET_ITEM(given, i)))
      call->names.push_back(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(given, i)));
  if (like != Py_None && h.calls == 1) {
    a.add(extent(read(result)));
    if (a.fit && locate(*h.function, h.params, a, call->pointers)) {
      call->function = h.function;
      call->params = h.params;
      call->like = py::reinterpret_borrow<py::object>(like);
    }
  }
  std::vector<std::shared_ptr<const Repeatable>> forgotten;  // freed last: PyTorch lets other threads run meanwhile
  if (known.size() == kMost) known.swap(forgotten);
  known.push_back(std::move(call));
}

// ----- what Python sees: two functions over one capsule

Repeats& of_capsule(PyObject* self, Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return *static_cast<Repeats*>(PyCapsule_GetPointer(self, nullptr));
  PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, %zd were given", wanted, given);
  throw PythonError();
}

PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));  // METH_FASTCALL says what it is
}

PyObject* repeat_again(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return guarded([&] { return of_capsule(self, count, 2).again(given[0], given[1]); });
}

PyObject* repeat_learn(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    of_capsule(self, count, 3).learn(given[0], given[1], given[2]);
    Py_RETURN_NONE;
  });
}

// ----- making it, without haste

py::object make_repeats(const py::capsule& exchange, py::object tensor, py::object parameter, py::tuple watchers,
                        py::object grad_enabled, py::object threads, py::object empty_like) {
  const auto* const table = static_cast<const DLExchange*>(PyCapsule_GetPointer(exchange.ptr(), exchange.name()));
  if (!table || table->major != 1 || !table->read) return py::none();
  static PyMethodDef again = {"again", as_method(repeat_again), METH_FASTCALL, "(arguments, scratch) -> result"};
  static PyMethodDef learn = {"learn", as_method(repeat_learn), METH_FASTCALL, "(arguments, result, like)"};
  auto* const repeats =
      new Repeats{table, tensor, parameter, watchers, grad_enabled, threads, empty_like, "is_neg", "requires_grad", {}};
  const py::capsule self(repeats, [](void* made) { delete static_cast<Repeats*>(made); });
  return py::make_tuple(py::reinterpret_steal<py::object>(PyCFunction_NewEx(&again, self.ptr(), nullptr)),
                        py::reinterpret_steal<py::object>(PyCFunction_NewEx(&learn, self.ptr(), nullptr)));
}
