// The only file that knows Python: each function takes the fields of its params struct, in order, as plain numbers
// (pointers as integers, a Context as its four fields) and releases the GIL while the kernel runs. Compiled once per
// backend into vit._<backend>.
//
// The C interface of Python alone: with a library of bindings this file took 10 s to compile instead of 0.7.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>

#include "vit.h"

using namespace vit;

namespace {

// A Python error is set.
struct PythonError {};

// The arguments of a call, read one after the other.
class Fields {
 public:
  Fields(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), count_(count) {}

  // Reads all fields of the params struct of `name`.
  template <class... Ts>
  void operator()(const char* name, Ts&... to) {
    constexpr Py_ssize_t wanted = (kWidth<Ts> + ...);
    if (count_ != wanted) {
      PyErr_Format(PyExc_TypeError, "%s takes %zd numbers, %zd were given", name, wanted, count_);
      throw PythonError();
    }
    (read(to), ...);
  }

 private:
  template <class T>
  static constexpr Py_ssize_t kWidth = std::is_same_v<T, Context> ? 4 : 1;

  PyObject* const* next_;
  Py_ssize_t count_;

  template <class T>
  static T checked(T value) {
    if (value == static_cast<T>(-1) && PyErr_Occurred()) throw PythonError();
    return value;
  }

  void read(void*& to) {
    to = PyLong_AsVoidPtr(*next_++);
    if (!to && PyErr_Occurred()) throw PythonError();
  }
  void read(const void*& to) {
    void* p;
    read(p);
    to = p;
  }
  void read(int64_t& to) { to = checked<int64_t>(PyLong_AsLongLong(*next_++)); }
  void read(double& to) { to = checked(PyFloat_AsDouble(*next_++)); }
  void read(int32_t& to) {
    int64_t wide;
    read(wide);
    to = static_cast<int32_t>(wide);
    if (to == wide) return;
    PyErr_Format(PyExc_OverflowError, "%lld does not fit in 32 bits", static_cast<long long>(wide));
    throw PythonError();
  }
  void read(bool& to) { to = checked(PyObject_IsTrue(*next_++)) != 0; }
  void read(DType& to) { to = static_cast<DType>(integer()); }
  void read(Activation& to) { to = static_cast<Activation>(integer()); }
  void read(Context& to) {
    read(to.stream);
    read(to.device);
    read(to.num_threads);
    read(to.allow_tf32);
  }

  int32_t integer() {
    int32_t value;
    read(value);
    return value;
  }
};

void read(Fields fields, LayerNormFwd& p) {
  fields("layer_norm_fwd", p.x, p.weight, p.bias, p.y, p.mean, p.rstd, p.M, p.C, p.x_stride, p.eps, p.dtype,
         p.param_dtype, p.context);
}

void read(Fields fields, LayerNormBwd& p) {
  fields("layer_norm_bwd", p.dy, p.x, p.weight, p.mean, p.rstd, p.dx, p.dweight, p.dbias, p.workspace, p.M, p.C,
         p.x_stride, p.dtype, p.param_dtype, p.context);
}

void read(Fields fields, GeluFwd& p) { fields("gelu_fwd", p.x, p.y, p.n, p.activation, p.dtype, p.context); }

void read(Fields fields, GeluBwd& p) { fields("gelu_bwd", p.dy, p.x, p.dx, p.n, p.activation, p.dtype, p.context); }

void read(Fields fields, MatmulFwd& p) {
  fields("matmul_fwd", p.a, p.b, p.c, p.workspace, p.batch, p.M, p.N, p.K, p.a_batch, p.a_row, p.a_col, p.b_batch,
         p.b_row, p.b_col, p.dtype, p.context);
}

void read(Fields fields, MatmulBwd& p) {
  fields("matmul_bwd", p.dc, p.a, p.b, p.da, p.db, p.workspace, p.batch, p.M, p.N, p.K, p.a_batch, p.a_row, p.a_col,
         p.b_batch, p.b_row, p.b_col, p.dtype, p.context);
}

void read(Fields fields, LinearFwd& p) {
  fields("linear_fwd", p.x, p.weight, p.bias, p.residual, p.y, p.preact, p.workspace, p.M, p.N, p.K, p.x_stride,
         p.weight_stride, p.activation, p.dtype, p.param_dtype, p.out_dtype, p.context);
}

void read(Fields fields, LinearBwd& p) {
  fields("linear_bwd", p.dy, p.x, p.weight, p.preact, p.dx, p.dweight, p.dbias, p.workspace, p.M, p.N, p.K, p.x_stride,
         p.weight_stride, p.activation, p.dtype, p.param_dtype, p.out_dtype, p.context);
}

void read(Fields fields, AttentionFwd& p) {
  fields("attention_fwd", p.q, p.k, p.v, p.out, p.lse, p.workspace, p.B, p.N, p.L, p.H, p.D, p.q_batch, p.q_token,
         p.q_head, p.k_batch, p.k_token, p.k_head, p.v_batch, p.v_token, p.v_head, p.scale, p.dtype, p.context);
}

void read(Fields fields, AttentionBwd& p) {
  fields("attention_bwd", p.dout, p.q, p.k, p.v, p.out, p.lse, p.dq, p.dk, p.dv, p.workspace, p.B, p.N, p.L, p.H, p.D,
         p.q_batch, p.q_token, p.q_head, p.k_batch, p.k_token, p.k_head, p.v_batch, p.v_token, p.v_head, p.dq_batch,
         p.dq_token, p.dq_head, p.dk_batch, p.dk_token, p.dk_head, p.dv_batch, p.dv_token, p.dv_head, p.scale, p.dtype,
         p.context);
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// f() with C++ exceptions as Python's: vit::Error becomes RuntimeError.
template <class F>
PyObject* guarded(F f) noexcept {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// What Python calls for a kernel, and for <op>_workspace, which returns bytes.
template <auto function>
struct Bound;

template <class P, void (*kernel)(const P&)>
struct Bound<kernel> {
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) noexcept {
    return guarded([&] {
      P params = {};
      read({arguments, count}, params);
      {
        const WithoutGil without;
        kernel(params);
      }
      Py_RETURN_NONE;
    });
  }
};

template <class P, std::size_t (*workspace)(const P&)>
struct Bound<workspace> {
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) noexcept {
    return guarded([&] {
      P params = {};
      read({arguments, count}, params);
      return PyLong_FromSize_t(workspace(params));
    });
  }
};

template <auto function>
PyMethodDef method(const char* name) {
  const auto call = reinterpret_cast<void (*)()>(Bound<function>::call);  // METH_FASTCALL says what it is
  return {name, reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr};
}

// [(name, value), ...] of vit::info().
PyObject* facts(PyObject*, PyObject*) noexcept {
  return guarded([] {
    const auto pairs = info();
    PyObject* list = PyList_New(0);
    for (const auto& [key, value] : pairs) {
      PyObject* pair = list ? Py_BuildValue("(ss)", key.c_str(), value.c_str()) : nullptr;
      if (pair && PyList_Append(list, pair) == 0) {
        Py_DECREF(pair);
        continue;
      }
      Py_XDECREF(pair);
      Py_XDECREF(list);
      throw PythonError();
    }
    return list;
  });
}

PyMethodDef methods[] = {
    {"info", facts, METH_NOARGS, nullptr},
    method<layer_norm_fwd>("layer_norm_fwd"),
    method<layer_norm_bwd>("layer_norm_bwd"),
    method<layer_norm_bwd_workspace>("layer_norm_bwd_workspace"),
    method<gelu_fwd>("gelu_fwd"),
    method<gelu_bwd>("gelu_bwd"),
    method<matmul_fwd>("matmul_fwd"),
    method<matmul_fwd_workspace>("matmul_fwd_workspace"),
    method<matmul_bwd>("matmul_bwd"),
    method<matmul_bwd_workspace>("matmul_bwd_workspace"),
    method<linear_fwd>("linear_fwd"),
    method<linear_fwd_workspace>("linear_fwd_workspace"),
    method<linear_bwd>("linear_bwd"),
    method<linear_bwd_workspace>("linear_bwd_workspace"),
    method<attention_fwd>("attention_fwd"),
    method<attention_fwd_workspace>("attention_fwd_workspace"),
    method<attention_bwd>("attention_bwd"),
    method<attention_bwd_workspace>("attention_bwd_workspace"),
    {nullptr, nullptr, 0, nullptr},
};

#define VIT_TEXT(name) #name
#define VIT_NAME(name) VIT_TEXT(name)
#define VIT_JOIN(a, b) a##b
#define VIT_INIT(name) VIT_JOIN(PyInit_, name)

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, VIT_NAME(VIT_MODULE), nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC VIT_INIT(VIT_MODULE)() {
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "contract", kContract) != 0) Py_CLEAR(module);
  return module;
}
