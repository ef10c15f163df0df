// The start of a pass: patches of the images, projected, with positions added, and normalised where there is a norm
// before the blocks or before the positions; and the prefix tokens, which come as they are then.
#pragma once

#include "cpu/engine/images.h"
#include "cpu/engine/linears.h"

namespace vit::VIT_ISA {

template <class T>
void report_not_finite(const Pass<T>& p, int64_t image) {
  int64_t* at = p.f.first_not_finite;
  int64_t known = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (image < known && !__atomic_compare_exchange_n(at, &known, image, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <class T, class X>
void embed_images(Pass<T>& p, const Images<X>& given) {
  const Shape& s = p.s;
  const Linear& w = p.net.patch;
  const int64_t patches = s.patches(), stride = padded<T>(s.patch_values());
  const int64_t begin = part(p.images * patches, p.team.member, p.team.members);
  const int64_t end = part(p.images * patches, p.team.member + 1, p.team.members);
  for (int64_t unit = begin; unit < end;) {
    const int64_t b = unit / patches, patch = unit % patches;
    const int64_t left = min(patches - patch, end - unit), rows = ceil_div(left, ceil_div(left, kRows));
    float differences = 0;
    for (int64_t r = 0; r < rows; ++r)
      differences += given.gather(p.first + b, patch + r, p.own.patches + r * stride, stride);
    if (!(differences == 0)) report_not_finite(p, p.first + b);
    float* x = p.tokens + (b * s.N() + s.prefix + patch) * s.C;
    const float* positions = p.net.positions + patch * s.C;
    const Epilogue<T, float, Activation::none> epilogue{w.bias, s.embed_norm ? nullptr : positions, x, nullptr, s.C};
    product(p, lhs_of(p.own.patches, stride), Area{0, rows, 0, panels_of<T>(s.C)}, w, epilogue);
    for (float* row = x; row < x + rows * s.C; row += s.C, positions += s.C) {
      if (s.embed_norm) {
        norm_one(s, p.net.embed_norm, row, row, s.C);
        add_row(1.0f, positions, row, s.C);
      }
      if (s.pre_norm) norm_one(s, p.net.pre_norm, row, row, s.C);
    }
    unit += rows;
  }
  for (int64_t b = p.team.member; s.prefix > 0 && b < p.images; b += p.team.members)
    memcpy(p.tokens + b * s.N() * s.C, p.net.prefix, static_cast<size_t>(s.prefix * s.C) * sizeof(float));
  p.clock.lap(Phase::embed);
}

template <class T>
void embed(Pass<T>& p) {
  const Forward& f = p.f;
  if (f.pixels == Pixels::uint8)
    embed_images(p, Images<uint8_t>{p.s, static_cast<const uint8_t*>(f.images), f.channels_last, f.height, f.width,
                                    p.net.mean, p.net.std});
  else
    embed_images(p, Images<float>{p.s, static_cast<const float*>(f.images), f.channels_last, f.height, f.width, nullptr,
                                  nullptr});
}

}  // namespace vit::VIT_ISA
