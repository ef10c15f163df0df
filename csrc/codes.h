// The enumerations of the contract. Their names and values reach Python through the compiled module; the kernels that
// SYCL compiles at run time read this file, too.
#pragma once

#define VIT_DTYPES(F) F(float32, 0) F(float64, 1) F(bfloat16, 2) F(float16, 3)
#define VIT_ACTIVATIONS(F) F(none, 0) F(gelu, 1) F(gelu_tanh, 2)  // gelu_tanh: gelu's approximation by a tanh

namespace vit {

#define VIT_ENUMERATOR(name, value) name = value,
enum class DType : int { VIT_DTYPES(VIT_ENUMERATOR) };
enum class Activation : int { VIT_ACTIVATIONS(VIT_ENUMERATOR) };
#undef VIT_ENUMERATOR

}  // namespace vit
