// The library as a Python module of the limited API: functions of integers (addresses, sizes) and floats.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops.h"

namespace {

template <class T> T argument(PyObject* value) {
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(PyLong_AsVoidPtr(value));
  else if constexpr (std::is_floating_point_v<T>) return PyFloat_AsDouble(value);
  else return PyLong_AsLongLong(value);
}

template <auto F> struct Bound;
template <class... A, int64_t (*F)(A...)> struct Bound<F> {
  template <size_t... I> static PyObject* convert(PyObject* const* arguments, std::index_sequence<I...>) {
    const std::tuple<A...> values{argument<A>(arguments[I])...};
    if (PyErr_Occurred()) return nullptr;
    int64_t result = 0;
    std::exception_ptr failure;
    Py_BEGIN_ALLOW_THREADS
    try {
      result = std::apply(F, values);
    } catch (...) {
      failure = std::current_exception();
    }
    Py_END_ALLOW_THREADS
    if (!failure) return PyLong_FromLongLong(result);
    try {
      std::rethrow_exception(failure);
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != Py_ssize_t(sizeof...(A))) return PyErr_Format(PyExc_TypeError, "%zd arguments, %zu expected", count, sizeof...(A));
    return convert(arguments, std::index_sequence_for<A...>{});
  }
};

#define BIND(f) {#f, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Bound<f>::call)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    BIND(has_level), BIND(use_parallel_for), BIND(use_set_threads), BIND(reserve_threads), BIND(packed_bytes), BIND(pack_weight), BIND(unpack_weight), BIND(quantize_rows),
    BIND(linear_dynamic_int8), BIND(linear_weight_only), BIND(linear_dynamic_int8_parts),
    BIND(linear_weight_only_parts), BIND(linear_int8_outlier), BIND(gptq_solve),
    BIND(scale_search), BIND(has_bfloat16_products), BIND(second_moments),
    BIND(int8_matmul), BIND(hadamard), BIND(linear_dense_sparse), BIND(table_lookup),
    BIND(table_inverse_root), BIND(linear_dense), BIND(rms_norm), BIND(silu_product), BIND(rotate_halves),
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "ABI", 11)) { Py_DECREF(module); return nullptr; }
  return module;
}
