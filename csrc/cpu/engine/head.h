// The end of a pass: pooling, the last norm, the head.
#pragma once

#include "cpu/engine/pass.h"
#include "cpu/layer_norm.h"

namespace vit::VIT_ISA {

inline void write(float* out, int64_t at, const float* values, int64_t count) {
  if (out) memcpy(out + at, values, static_cast<size_t>(count) * sizeof(float));
}

template <class T>
void last_norm(const Pass<T>& p, const float* x, float* y) {
  norm_row(x, y, p.net.norm.weight, p.net.norm.bias, p.s.C, p.s.eps);
}

template <class T>
void classify(const Pass<T>& p, const float* features, int64_t rows, float* logits, int64_t panel_begin,
              int64_t panel_end) {
  const Shape& s = p.s;
  const Left left{reinterpret_cast<const char*>(features), s.C * static_cast<int64_t>(sizeof(float)), false};
  gemm_range<float, false>(
      left, p.net.head.weight, s.classes, s.C, 0, rows, panel_begin, panel_end,
      Epilogue<float, float, Activation::none>{p.net.head.bias, nullptr, logits, nullptr, s.classes});
}

// y = the mean of the patch tokens x, or of what the last norm makes of them.
template <class T>
void average(const Pass<T>& p, const float* x, float* y) {
  const Shape& s = p.s;
  const auto for_vectors = [&](const auto& f) {
    for (int64_t j = 0; j < s.C; j += kLanes<float>) f(j, s.C - j);
  };
  memset(y, 0, static_cast<size_t>(s.C) * sizeof(float));
  for (int64_t i = 0; i < s.patches(); ++i) {
    const float* row = x + i * s.C;
    if (s.norm_first) {
      last_norm(p, row, p.own.row);
      row = p.own.row;
    }
    for_vectors([&](int64_t j, int64_t n) { store<float>(y + j, load<float>(y + j, n) + load<float>(row + j, n), n); });
  }
  const float scale = 1.0f / static_cast<float>(s.patches());
  for_vectors([&](int64_t j, int64_t n) { store<float>(y + j, scale * load<float>(y + j, n), n); });
}

// Without pooling every token has its logits.
template <class T>
void head_of_tokens(Pass<T>& p) {
  const Shape& s = p.s;
  const Forward& f = p.f;
  const int64_t rows = p.images * s.N(), base = p.first * s.N();
  float* normed = p.normed_tokens;
  const int64_t begin = part(rows, p.team.member, p.team.members), end = part(rows, p.team.member + 1, p.team.members);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t n = min(kRows, end - i), at = base + i;
    for (int64_t r = 0; r < n; ++r) last_norm(p, p.tokens + (i + r) * s.C, normed + r * s.C);
    write(f.features, at * s.C, normed, n * s.C);
    if (!s.classes) write(f.logits, at * s.C, normed, n * s.C);
    if (s.classes && f.logits) classify(p, normed, n, f.logits + at * s.classes, 0, panels_of<float>(s.classes));
  }
}

template <class T>
void head_of_pooled(Pass<T>& p) {
  const Shape& s = p.s;
  const Forward& f = p.f;
  const Team& team = p.team;
  for (int64_t b = team.member; b < p.images; b += team.members) {
    float* y = p.pooled + b * s.C;
    const float* x = p.ends_with_token() ? y : p.tokens + b * s.N() * s.C;
    if (s.pool == Pool::average) {
      average(p, x + s.prefix * s.C, y);
      x = y;
    }
    if (s.pool == Pool::token || !s.norm_first) last_norm(p, x, y);
    write(f.features, (p.first + b) * s.C, y, s.C);
    if (!s.classes) write(f.logits, (p.first + b) * s.C, y, s.C);
  }
  p.meet();
  if (!s.classes || !f.logits) return;
  const int64_t panels = panels_of<float>(s.classes);
  classify(p, p.pooled, p.images, f.logits + p.first * s.classes, part(panels, team.member, team.members),
           part(panels, team.member + 1, team.members));
}

template <class T>
void head(Pass<T>& p) {
  p.s.pool == Pool::none ? head_of_tokens(p) : head_of_pooled(p);
  p.clock.lap(Phase::head);
}

}  // namespace vit::VIT_ISA
