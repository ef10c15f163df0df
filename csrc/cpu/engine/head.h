// The end of a pass: pooling, the last norm, the head.
#pragma once

#include "cpu/engine/pool.h"

namespace vit::VIT_ISA {

inline void write(float* out, int64_t at, const float* values, int64_t count) {
  if (out) memcpy(out + at, values, static_cast<size_t>(count) * sizeof(float));
}

template <class T>
void classify(const Pass<T>& p, const float* features, int64_t rows, float* logits, int64_t panel_begin,
              int64_t panel_end) {
  const Shape& s = p.s;
  const int64_t K = s.pooled();
  packed_product<float>(lhs_of(features, K), Area{0, rows, panel_begin, panel_end}, p.net.head,
                        Epilogue<float, float, Activation::none>{p.net.head.bias, nullptr, logits, nullptr, s.classes});
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
    if (s.last_norm == LastNorm::absent)
      memcpy(normed, p.tokens + i * s.C, static_cast<size_t>(n * s.C) * sizeof(float));
    for (int64_t r = 0; s.last_norm != LastNorm::absent && r < n; ++r)
      last_norm(p, p.tokens + (i + r) * s.C, normed + r * s.C);
    write(f.features, at * s.C, normed, n * s.C);
    if (!s.classes) write(f.logits, at * s.C, normed, n * s.C);
    if (s.classes && f.logits) classify(p, normed, n, f.logits + at * s.classes, 0, panels_of<float>(s.classes));
  }
}

// The tokens x of image b -> what the head reads, in y, and the features of the image where they are wanted.
template <class T>
void finish_image(const Pass<T>& p, int64_t b, const float* x, float* y) {
  const Shape& s = p.s;
  const Forward& f = p.f;
  const float* features = y;
  const bool normed_before = s.last_norm == LastNorm::first && s.pool != Pool::token && s.pool != Pool::distilled;
  if (s.pool == Pool::average || s.pool == Pool::max || s.pool == Pool::average_max) {
    reduce(p, x, y);
    x = y;
  }
  const int64_t rows = s.pool == Pool::distilled ? 2 : 1;
  for (int64_t r = 0; r < rows; ++r) {
    if (s.last_norm != LastNorm::absent && !normed_before)
      last_norm(p, x + r * s.C, y + r * s.C);
    else if (x != y)
      memcpy(y + r * s.C, x + r * s.C, static_cast<size_t>(s.C) * sizeof(float));
  }
  if (s.pool == Pool::distilled) {
    for_vectors(s.C, [&](int64_t j, int64_t n) {
      store<float>(p.own.row + j, 0.5f * (load<float>(y + j, n) + load<float>(y + s.C + j, n)), n);
    });
    features = p.own.row;
  }
  write(f.features, (p.first + b) * s.C, features, s.C);
  if (!s.classes) write(f.logits, (p.first + b) * s.C, features, s.C);
}

template <class T>
void head_of_pooled(Pass<T>& p, Pass<T>& of_tokens) {
  const Shape& s = p.s;
  const Forward& f = p.f;
  const Team& team = p.team;
  const bool attends = s.pool == Pool::attention;
  if (attends) attention_pool(p, of_tokens);
  for (int64_t b = team.member; b < p.images; b += team.members) {
    float* y = p.pooled + b * s.pooled();
    finish_image(p, b, attends || p.ends_with_token() ? y : p.tokens + b * s.N() * s.C, y);
  }
  p.meet();
  if (!s.classes || !f.logits) return;
  const int64_t panels = panels_of<float>(s.classes);
  classify(p, p.pooled, p.images, f.logits + p.first * s.classes, part(panels, team.member, team.members),
           part(panels, team.member + 1, team.members));
}

template <class T>
void head(Pass<T>& p, Pass<T>& of_tokens) {
  p.s.pool == Pool::none ? head_of_tokens(p) : head_of_pooled(p, of_tokens);
  p.clock.lap(Phase::head);
}

}  // namespace vit::VIT_ISA
