// The enumerations of the contract. Their names and values reach Python through the compiled module; the kernels that
// SYCL compiles at run time read this file, too.
#pragma once

#define VIT_DTYPES(F) F(float32, 0) F(float64, 1) F(bfloat16, 2) F(float16, 3)
// gelu_tanh and quick_gelu: gelu's approximations by a tanh and by a logistic function; silu: x / (1 + e^-x);
// relu: max(x, 0), whose derivative at 0 is 0.
#define VIT_ACTIVATIONS(F) F(none, 0) F(gelu, 1) F(gelu_tanh, 2) F(quick_gelu, 3) F(silu, 4) F(relu, 5)
// Elements of a head that rotary turns together: 2k and 2k + 1, or k and k + D / 2.
#define VIT_PAIRINGS(F) F(interleaved, 0) F(half, 1)

namespace vit {

#define VIT_ENUMERATOR(name, value) name = value,
enum class DType : int { VIT_DTYPES(VIT_ENUMERATOR) };
enum class Activation : int { VIT_ACTIVATIONS(VIT_ENUMERATOR) };
enum class Pairing : int { VIT_PAIRINGS(VIT_ENUMERATOR) };
#undef VIT_ENUMERATOR

}  // namespace vit
