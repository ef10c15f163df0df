// From images to rows of patch values: [channels, patch_height, patch_width] of one patch, normalised, as the packed
// patch projection reads them. Copying costs about 1 % of ViT-Ti and needs no second layout of the weights.
#pragma once

#include "cpu/simd.h"
#include "engine/network.h"

namespace vit::VIT_ISA {

typedef uint8_t u8qv __attribute__((vector_size(kVectorBytes / 4)));  // as many elements as f32v

VIT_INLINE f32v load_pixels(const float* p, int64_t n) { return load<float>(p, n); }
VIT_INLINE f32v load_pixels(const uint8_t* p, int64_t n) {
  u8qv bytes{};
  memcpy(&bytes, p, static_cast<size_t>(min<int64_t>(n, kLanes<float>)));
  return __builtin_convertvector(bytes, f32v);
}

// Images of pixel type X, contiguous.
template <class X>
struct Images {
  const engine::Shape& shape;
  const X* data;
  bool channels_last;
  int64_t height, width;  // of the images given: smaller than the shape's with dynamic_pad
  const float *mean, *std;

  // Patch number `patch` of image b to `out`, `padded` >= patch_values elements. Returns x - x summed over the pixels:
  // 0, or NaN where one is not finite.
  template <class T>
  VIT_INLINE float gather(int64_t b, int64_t patch, T* out, int64_t padded) const {
    const int64_t P = shape.patch_height, Q = shape.patch_width, columns = shape.columns();
    const int64_t y0 = patch / columns * P, x0 = patch % columns * Q;
    const int64_t n = max<int64_t>(min(Q, width - x0), 0);
    f32v differences{};
    for (int64_t c = 0; c < shape.channels; ++c) {
      const f32v scale = broadcast(same<X, uint8_t> ? 1.0f / (255.0f * std[c]) : 1.0f);
      const f32v shift = broadcast(same<X, uint8_t> ? -mean[c] / std[c] : 0.0f);
      for (int64_t y = 0; y < P; ++y, out += Q) {
        const int64_t given = y0 + y < height ? n : 0;
        const X* line = this->line(b, c, y0 + y, x0);
        for (int64_t q = 0; q < given; q += kLanes<float>) {
          f32v v = channels_last ? strided(line + q * shape.channels, given - q) : load_pixels(line + q, given - q);
          if constexpr (same<X, uint8_t>)
            v = fma(v, scale, shift);
          else
            differences += v - v;
          store<float>(out + q, v, given - q);
        }
        for (int64_t q = given; q < Q; ++q) out[q] = T{};
      }
    }
    for (int64_t k = shape.patch_values(); k < padded; ++k) *out++ = T{};
    return sum(differences);
  }

 private:
  VIT_INLINE const X* line(int64_t b, int64_t c, int64_t y, int64_t x) const {
    const int64_t C = shape.channels;
    return channels_last ? data + ((b * height + y) * width + x) * C + c
                         : data + ((b * C + c) * height + y) * width + x;
  }

  VIT_INLINE f32v strided(const X* p, int64_t n) const {
    f32v v{};
    for (int i = 0; i < min<int64_t>(n, kLanes<float>); ++i) v[i] = static_cast<float>(p[i * shape.channels]);
    return v;
  }
};

}  // namespace vit::VIT_ISA
