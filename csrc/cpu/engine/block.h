// One block of the network for the images of a pass.
//
// Where only the class token of the last block is wanted (pooling takes it, nobody asked for the tokens), the last
// block computes keys and values of all tokens and everything else of that one: 0.6 to 0.9 of a block less, one in 12.
#pragma once

#include "cpu/engine/mlp.h"
#include "cpu/engine/place.h"

namespace vit::VIT_ISA {

// Images [b, b + count) of the pass: their queries, keys and values. With `of_token` only the class token has queries.
template <class T>
void project(Pass<T>& p, int64_t l, int64_t b, int64_t count, bool of_token) {
  const Block& w = p.net.blocks[l];
  const int64_t N = p.s.N(), C = p.s.C, panels = panels_of<T>(w.qkv.N);
  const int64_t of_queries = of_token ? C / kTileColumns<T> : 0;  // panels that hold nothing but queries
  const float* x = p.tokens + b * N * C;
  p.for_rows(count * N, [&](int64_t i0, int64_t i1) {
    normalize(p, x + i0 * C, i1 - i0, w.norm1, w.qkv);
    const auto rows = [&](const Area& area) {
      linear<Activation::none, T, T>(p, p.own.normed, area, w.qkv, nullptr, p.qkv + i0 * 3 * C);
    };
    for (int64_t i = round_up(i0, N); of_queries && i < i1; i += N)
      rows(share_of(p, i - i0, i - i0 + 1, 0, of_queries));
    rows(share_of(p, 0, i1 - i0, of_queries, panels));
    p.clock.lap(Phase::qkv);
    if (!places(p.s)) return;
    p.meet_columns();  // heads do not end where the columns of a thread do
    const Team& team = p.team;
    place(p, l, i0 + part(i1 - i0, team.column, team.columns), i0 + part(i1 - i0, team.column + 1, team.columns),
          of_token);
    p.clock.lap(Phase::place);
  });
}

// Scores, already times log2(e), to their softmax, in place.
VIT_INLINE void softmax_of_row(float* row, int64_t count) {
  float largest = -INFINITY;
  for (int64_t j = 0; j < count; ++j) largest = max(largest, row[j]);
  f32v total{};
  for (int64_t j = 0; j < count; j += kLanes<float>) {
    const f32v e = keep(exp2<float>(load<float>(row + j, count - j) - largest), count - j, 0.0f);
    total += e;
    store<float>(row + j, e, count - j);
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t j = 0; j < count; ++j) row[j] *= inverse;
}

// softmax(scale q k^T) of the first token, image b of the group, head h.
template <class T>
void class_attention(const AttentionFwd& a, int64_t b, int64_t h, float* out) {
  const T* q = static_cast<const T*>(a.q.data) + b * a.q.batch + h * a.q.head;
  const T* k = static_cast<const T*>(a.k.data) + b * a.k.batch + h * a.k.head;
  const float scale = static_cast<float>(a.scale * 1.44269504088896340736);
  for (int64_t j = 0; j < a.L; ++j) {
    f32v dot{};
    for (int64_t d = 0; d < a.D; d += kLanes<float>)
      dot = fma(load<float>(q + d, a.D - d), load<float>(k + j * a.k.token + d, a.D - d), dot);
    out[j] = scale * sum(dot);
  }
  softmax_of_row(out, a.L);
}

// Images [b, b + count) of the pass: attention of all tokens, [rows, C] in p.attended, or with `of_token` of the class
// token of each image, [images, C].
template <class T>
void attend(Pass<T>& p, int64_t l, int64_t b, int64_t count, bool of_token) {
  const Shape& s = p.s;
  const Team& team = p.team;
  AttentionFwd a = attention_of<T>(s, count);
  a.q.data = p.qkv, a.k.data = p.qkv + s.C, a.v.data = p.qkv + 2 * s.C, a.out = p.attended;
  if (of_token) a.N = 1, a.out = p.attended + b * s.C;
  const int64_t units = attention_fwd_units(a);
  attention_fwd_range(a, p.own.scratch, part(units, team.member, team.members),
                      part(units, team.member + 1, team.members));
  if (p.f.attention[l])
    for (int64_t unit = team.member; unit < count * s.H; unit += team.members)
      class_attention<T>(a, unit / s.H, unit % s.H, p.f.attention[l] + ((p.first + b) * s.H + unit) * s.N());
  p.clock.lap(Phase::attention);
}

// What follows attention: rows of the residual stream y.
template <class T>
void rest_of_block(Pass<T>& p, const Block& w, Activation activation, const T* attended, int64_t rows, float* y) {
  if (w.attn_norm.weight) {
    normalize(p, attended, rows, w.attn_norm, w.proj);
    attended = p.own.normed;
  } else {
    quantize(p, attended, rows, w.proj);
  }
  linear<Activation::none, T, float>(p, attended, rows, w.proj, y, y);
  p.clock.lap(Phase::proj);
  p.meet_columns();
  normalize(p, y, rows, w.norm2, w.fc1);
  const T* hidden = hidden_of(p, w, activation, rows);
  quantize(p, hidden, rows, w.fc2);
  linear<Activation::none, T, float>(p, hidden, rows, w.fc2, y, y);
  p.clock.lap(Phase::fc2);
  p.meet_columns();
}

// Block l for images [b, b + count) of the pass.
template <class T>
void block(Pass<T>& p, int64_t l, int64_t b, int64_t count) {
  const Block& w = p.net.blocks[l];
  const int64_t N = p.s.N(), C = p.s.C;
  float* x = p.tokens + b * N * C;
  project(p, l, b, count, false);
  p.meet();
  attend(p, l, b, count, false);
  p.meet();
  p.for_rows(count * N, [&](int64_t i0, int64_t i1) {
    const int64_t rows = i1 - i0;
    float* y = x + i0 * C;
    rest_of_block(p, w, p.s.activation, p.attended + i0 * C, rows, y);
    if (p.f.tokens[l] && p.team.column == 0)
      memcpy(p.f.tokens[l] + ((p.first + b) * N + i0) * C, y, static_cast<size_t>(rows * C) * sizeof(float));
  });
}

// The last block for the class tokens, which move to p.pooled. `of_tokens` is the same pass whose team divides one row
// of each image instead of all of them.
template <class T>
void last_block(Pass<T>& p, Pass<T>& of_tokens) {
  const int64_t l = p.s.depth - 1, N = p.s.N(), C = p.s.C;
  const Block& w = p.net.blocks[l];
  for (int64_t b = 0; b < p.images; b += p.group) {
    const int64_t count = min(p.group, p.images - b);
    project(p, l, b, count, true);
    p.meet();
    attend(p, l, b, count, true);
  }
  for (int64_t b = p.team.member; b < p.images; b += p.team.members)
    memcpy(p.pooled + b * C, p.tokens + b * N * C, static_cast<size_t>(C) * sizeof(float));
  p.meet();
  of_tokens.for_rows(p.images, [&](int64_t i0, int64_t i1) {
    rest_of_block(of_tokens, w, p.s.activation, p.attended + i0 * C, i1 - i0, p.pooled + i0 * C);
  });
}

}  // namespace vit::VIT_ISA
