// One block of the network for a group of images of a pass.
#pragma once

#include "cpu/engine/linears.h"

namespace vit::VIT_ISA {

// softmax(scale q k^T) of the class token, image b of the group, head h.
template <class T>
void class_attention(const AttentionFwd& a, int64_t b, int64_t h, float* out) {
  const T* q = static_cast<const T*>(a.q) + b * a.q_batch + h * a.q_head;
  const T* k = static_cast<const T*>(a.k) + b * a.k_batch + h * a.k_head;
  const float scale = static_cast<float>(a.scale * 1.44269504088896340736);
  float largest = -INFINITY;
  for (int64_t j = 0; j < a.N; ++j) {
    f32v dot{};
    for (int64_t d = 0; d < a.D; d += kLanes<float>)
      dot = fma(load<float>(q + d, a.D - d), load<float>(k + j * a.k_token + d, a.D - d), dot);
    out[j] = scale * sum(dot);
    largest = max(largest, out[j]);
  }
  f32v total{};
  for (int64_t j = 0; j < a.N; j += kLanes<float>) {
    const f32v e = keep(exp2<float>(load<float>(out + j, a.N - j) - largest), a.N - j, 0.0f);
    total += e;
    store<float>(out + j, e, a.N - j);
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t j = 0; j < a.N; ++j) out[j] *= inverse;
}

// Images [b, b + count) of the pass: attended = attention(qkv).
template <class T>
void attend(Pass<T>& p, int64_t l, int64_t b, int64_t count) {
  const Shape& s = p.s;
  const Team& team = p.team;
  AttentionFwd a = attention_of(s, count);
  a.q = p.qkv, a.k = p.qkv + s.C, a.v = p.qkv + 2 * s.C, a.out = p.attended;
  const int64_t units = attention_fwd_units(a);
  attention_fwd_range(a, p.own.scratch, part(units, team.member, team.members),
                      part(units, team.member + 1, team.members));
  if (p.f.attention[l])
    for (int64_t unit = team.member; unit < count * s.H; unit += team.members)
      class_attention<T>(a, unit / s.H, unit % s.H, p.f.attention[l] + ((p.first + b) * s.H + unit) * s.N());
  p.clock.lap(Phase::attention);
}

// What follows attention, for rows [i0, i1) of the group, which are `y`.
template <class T>
void rest_of_block(Pass<T>& p, const Block& w, int64_t i0, int64_t i1, float* y) {
  const int64_t rows = i1 - i0;
  const T* attended = p.attended + i0 * p.s.C;
  quantize(p, attended, rows, w.proj);
  linear<Activation::none, T, float>(p, attended, rows, w.proj, y, y);
  p.clock.lap(Phase::proj);
  p.meet_columns();
  normalize(p, y, rows, w.norm2, w.fc1);
  with_activation(p.s.activation, [&](auto activation) {
    linear<decltype(activation)::value, T, T>(p, p.own.normed, rows, w.fc1, nullptr, p.shared_hidden);
  });
  p.clock.lap(Phase::fc1);
  p.meet_columns();
  quantize(p, p.shared_hidden, rows, w.fc2);
  linear<Activation::none, T, float>(p, p.shared_hidden, rows, w.fc2, y, y);
  p.clock.lap(Phase::fc2);
  p.meet_columns();
}

// Block l for images [b, b + count) of the pass.
template <class T>
void block(Pass<T>& p, int64_t l, int64_t b, int64_t count) {
  const Block& w = p.net.blocks[l];
  const int64_t N = p.s.N(), M = count * N, C = p.s.C;
  float* x = p.tokens + b * N * C;
  p.for_rows(M, [&](int64_t i0, int64_t i1) {
    normalize(p, x + i0 * C, i1 - i0, w.norm1, w.qkv);
    linear<Activation::none, T, T>(p, p.own.normed, i1 - i0, w.qkv, nullptr, p.qkv + i0 * 3 * C);
    p.clock.lap(Phase::qkv);
  });
  p.meet();
  attend(p, l, b, count);
  p.meet();
  p.for_rows(M, [&](int64_t i0, int64_t i1) {
    float* y = x + i0 * C;
    rest_of_block(p, w, i0, i1, y);
    if (p.f.tokens[l] && p.team.column == 0)
      memcpy(p.f.tokens[l] + ((p.first + b) * N + i0) * C, y, static_cast<size_t>((i1 - i0) * C) * sizeof(float));
  });
}

}  // namespace vit::VIT_ISA
