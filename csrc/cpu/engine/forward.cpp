// The whole network in one parallel region.
//
//   tokens = [prefix; patches W + b + positions]
//   tokens += proj(attention(qkv(norm1(tokens)))),  tokens += fc2(gelu(fc1(norm2(tokens))))     for each block
//   logits = head(norm(pool(tokens)))
//
// Threads take whole images where there are enough: no thread waits for another, and the queries, keys and values of an
// image stay in its L2. What is left over, fewer images than threads, is done by all threads together: they share the
// rows (all tokens of all these images), where there are few rows per thread also the columns, and the heads. Then two
// barriers per block suffice, or five where columns are shared.
//
// The residual stream is float32. Rows go through a block in pieces of kRows, so that what norm, fc1 and the activation
// make stays in L2 until it is used. Nothing here decides the order of a sum: gemm.h and attention_fwd.cpp do, from
// sizes alone, so that a result depends neither on the threads nor on what else is in the batch.
#include <time.h>

#include "cpu/attention.h"
#include "cpu/engine/compressed.h"
#include "cpu/engine/images.h"
#include "cpu/engine/int8.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"

namespace vit::VIT_ISA {
namespace {

using namespace engine;

constexpr int64_t kRows = kBlockRows;  // ViT's 197 tokens are two pieces of 98 or 99
constexpr int64_t kImages = 4;         // of a thread at a time: they share what a layer's weights cost to fetch
constexpr int64_t kGroupRows = 2 * kRows;

// The range [0, size) in `count` nearly equal parts.
VIT_INLINE int64_t part(int64_t size, int64_t i, int64_t count) { return size * i / count; }

// Elements from row to row of an operand A whose steps are read in place.
template <class T>
int64_t padded(int64_t K) {
  return round_up(K, Step<T>::kDepth);
}

// --- memory ---------------------------------------------------------------------------------------------------------

AttentionFwd attention_of(const Shape& s, int64_t images) {
  AttentionFwd p{};
  p.B = images, p.N = p.L = s.N(), p.H = s.H, p.D = s.D();
  p.q_batch = p.k_batch = p.v_batch = s.N() * 3 * s.C;
  p.q_token = p.k_token = p.v_token = 3 * s.C;
  p.q_head = p.k_head = p.v_head = s.D();
  p.scale = 1.0 / ::sqrt(static_cast<double>(s.D()));
  p.dtype = s.precision == Precision::float32 ? DType::float32 : DType::bfloat16;
  return p;
}

// How many images one thread takes through the network at a time, and of how many the rows go through a block together.
struct Share {
  int64_t images, group;

  Share(const Shape& s, int64_t B, int threads) {
    group = max<int64_t>(kGroupRows / s.N(), 1);
    images = max<int64_t>(min(max(kImages, group), B / threads), 1);
    group = min(group, images);
  }
};

// The arena. Slices belong to a thread while it has images of its own, and all of a part to the threads together.
template <class T>
struct Buffers {
  int64_t slice_tokens, slice_qkv, slice_attended, slice_pooled;
  float* tokens;  // [rows, C]
  T* qkv;         // [rows, 3, H, D]
  T* attended;    // [rows, H, D]
  float* pooled;  // [images, C], or a piece of normalised tokens
  char* threads;  // of each thread: the parts below
  int64_t bytes_per_thread, bytes;

  struct Own {
    T* normed;            // [kRows, C]
    T* hidden;            // [kRows, hidden]
    T* patches;           // [kRows, padded patch_values]
    char* panel;          // of a compressed weight, unpacked
    float* row;           // [C]
    Quantized quantized;  // [kRows, the wider of C and hidden], where there are int8 layers
    char* scratch;        // of attention
  };

  Buffers(const Shape& s, int64_t B, int threads, char* base) {
    const Share share(s, B, threads);
    const int64_t N = s.N(), together = min<int64_t>(B, threads - 1);  // images that all threads share
    slice_tokens = share.images * N * s.C;
    slice_qkv = share.group * N * 3 * s.C;
    slice_attended = share.group * N * s.C;
    slice_pooled = max(share.images, s.pool == Pool::none ? kRows : 0) * s.C;
    Arena arena{base};
    tokens = take<float>(arena, max(threads * slice_tokens, together * N * s.C));
    qkv = take<T>(arena, max(threads * slice_qkv, together * N * 3 * s.C));
    attended = take<T>(arena, max(threads * slice_attended, together * N * s.C));
    pooled = take<float>(arena, max(threads * slice_pooled, together * s.C));
    Arena one{nullptr};
    own(s, one);
    bytes_per_thread = one.used;
    this->threads = arena.take(threads * bytes_per_thread);
    bytes = arena.used;
  }

  static Own own(const Shape& s, Arena& arena) {
    Own own;
    own.normed = take<T>(arena, kRows * s.C);
    own.hidden = take<T>(arena, kRows * s.hidden);
    own.patches = take<T>(arena, kRows * padded<T>(s.patch_values()));
    own.panel = arena.take(s.unpacks ? packed_b_bytes<bf16>(max(s.C, s.hidden), kTileColumns<bf16>) : 0);
    own.row = take<float>(arena, s.C);
    const int64_t quantized_rows = s.precision == Precision::int8 ? kRows : 0;
    own.quantized = {take<uint8_t>(arena, quantized_rows * max(s.C, s.hidden)), take<float>(arena, quantized_rows)};
    own.scratch = arena.take(attention_fwd_scratch(attention_of(s, 1)));
    return own;
  }

  template <class E>
  static E* take(Arena& arena, int64_t count) {
    return reinterpret_cast<E*>(arena.take(count * static_cast<int64_t>(sizeof(E))));
  }
};

// --- time -----------------------------------------------------------------------------------------------------------

// Adds the time since the last lap to a phase; does nothing where `seconds` is null.
struct Clock {
  double* seconds;
  double last = 0;

  explicit Clock(double* seconds) : seconds(seconds) {
    if (seconds) last = now();
  }
  VIT_INLINE void lap(Phase phase) {
    if (!seconds) return;
    const double time = now();
    seconds[static_cast<int>(phase)] += time - last;
    last = time;
  }
  static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
};

// --- a pass ---------------------------------------------------------------------------------------------------------

// Threads that take some images through the network together, and the calling thread's place among them: row part
// `row` of `rows`, column part `column` of `columns`. Threads beyond rows * columns only help with attention.
struct Team {
  int member, members;
  int64_t row, rows, column, columns;
  Barrier* all;
  Barrier* of_row;

  // Alone.
  Team() : member(0), members(1), row(0), rows(1), column(0), columns(1), all(nullptr), of_row(nullptr) {}

  template <class T>
  static Team of(int member, int members, int64_t M, int64_t C, Barrier* barriers) {
    Team team;
    const int64_t panels = panels_of<T>(C);
    team.member = member, team.members = members;
    team.rows = row_parts(members, M, panels);
    team.columns = min(max<int64_t>(members / team.rows, 1), panels);
    team.row = member / team.columns, team.column = member % team.columns;
    team.all = barriers, team.of_row = barriers + 1 + team.row;
    return team;
  }

  // Into how many parts the rows are divided; what is left of the threads divides the columns. A part of the rows pays
  // for a pass over the weights (as for 4 rows more), threads that share columns all normalise and quantize the same
  // rows (as for half a panel more).
  static int64_t row_parts(int members, int64_t M, int64_t panels) {
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t rows = 1; rows <= min<int64_t>(members, M); ++rows) {
      const int64_t share = ceil_div(M, rows) + 4, half_panels = 2 * ceil_div(panels, members / rows) + 1;
      if (share * half_panels <= best_cost) best = rows, best_cost = share * half_panels;
    }
    return best;
  }

  bool has_rows() const { return row < rows; }
};

// Images [first, first + images) of the batch through the whole network. T: the type between the products.
template <class T>
class Pass {
 public:
  Pass(const Forward& f, const Buffers<T>& memory, const Team& team, int thread, Clock& clock, int64_t first,
       int64_t images, int64_t group)
      : f(f), net(*f.network), s(net.shape), team(team), clock(clock), first(first), images(images), group(group) {
    const int64_t slice = team.members > 1 ? 0 : thread;
    tokens = memory.tokens + slice * memory.slice_tokens;
    qkv = memory.qkv + slice * memory.slice_qkv;
    attended = memory.attended + slice * memory.slice_attended;
    pooled = memory.pooled + slice * memory.slice_pooled;
    normed_tokens = memory.pooled + thread * memory.slice_pooled;
    Arena arena{memory.threads + thread * memory.bytes_per_thread};
    own = Buffers<T>::own(s, arena);
    Arena of_leader{memory.threads + (thread - team.column) * memory.bytes_per_thread};
    shared_hidden = Buffers<T>::own(s, of_leader).hidden;
  }

  void run() {
    if (f.pixels == Pixels::uint8)
      embed(Images<uint8_t>{s, static_cast<const uint8_t*>(f.images), f.channels_last, f.height, f.width, net.mean,
                            net.std});
    else
      embed(
          Images<float>{s, static_cast<const float*>(f.images), f.channels_last, f.height, f.width, nullptr, nullptr});
    meet();
    for (int64_t l = 0; l < s.depth; ++l)
      for (int64_t b = 0; b < images; b += group) layer(l, b, min(group, images - b));
    meet();
    head();
  }

 private:
  const Forward& f;
  const Network& net;
  const Shape& s;
  const Team& team;
  Clock& clock;
  const int64_t first, images, group;
  float* tokens;
  T *qkv, *attended;
  float *pooled, *normed_tokens;
  typename Buffers<T>::Own own;
  T* shared_hidden;  // of the threads that share rows

  void meet() {
    if (team.members > 1) team.all->wait(team.members);
    clock.lap(Phase::wait);
  }
  void meet_columns() {
    if (team.columns < 2) return;
    team.of_row->wait(static_cast<int>(team.columns));
    clock.lap(Phase::wait);
  }

  // Calls f(begin, end) for pieces of at most kRows rows of this thread's part of M.
  template <class F>
  void for_rows(int64_t M, const F& f) const {
    if (!team.has_rows()) return;
    const int64_t begin = part(M, team.row, team.rows), end = part(M, team.row + 1, team.rows);
    const int64_t pieces = ceil_div(end - begin, kRows);
    for (int64_t i = 0; i < pieces; ++i)
      f(begin + part(end - begin, i, pieces), begin + part(end - begin, i + 1, pieces));
  }

  // This thread's columns of a[rows, K] weight^T for an epilogue.
  template <class S, class E>
  void product(const void* a, int64_t rows, const Linear& w, const E& epilogue) const {
    const int64_t panels = panels_of<S>(w.N);
    const Left left{static_cast<const char*>(a), w.K * static_cast<int64_t>(sizeof(S)), false};
    gemm_range<S, false>(left, w.weight, w.N, steps_of<S>(w.K), 0, rows, part(panels, team.column, team.columns),
                         part(panels, team.column + 1, team.columns), epilogue);
  }

  // The same for a compressed weight, panel by panel.
  template <class E>
  void compressed_product(const void* a, int64_t rows, const Linear& w, const E& epilogue) const {
    const int64_t panels = panels_of<bf16>(w.N), steps = steps_of<bf16>(w.K);
    const Left left{static_cast<const char*>(a), w.K * static_cast<int64_t>(sizeof(bf16)), false};
    const int64_t end = part(panels, team.column + 1, team.columns);
    for (int64_t panel = part(panels, team.column, team.columns); panel < end; ++panel) {
      with_code(w.precision, [&](auto code) { unpack_panel<decltype(code)>(w, panel, own.panel); });
      const int64_t first = panel * kTileColumns<bf16>, columns = min<int64_t>(w.N - first, kTileColumns<bf16>);
      gemm_range<bf16, false>(left, own.panel, columns, steps, 0, rows, 0, 1, [&](Tile<float> tile) {
        tile.column += first;
        epilogue(tile);
      });
    }
  }

  // y = activation(a weight^T + bias) + residual. Where the layer is quantized, a is in own.quantized.
  template <Activation kActivation, class O>
  void linear(const T* a, int64_t rows, const Linear& w, const O* residual, O* y) const {
    if constexpr (same<T, bf16>) {
      if (w.precision == Precision::int8)
        return product<q8>(
            own.quantized.bytes, rows, w,
            QuantizedEpilogue<O, kActivation>{own.quantized.scales, w.scale, w.sums, w.bias, residual, y, w.N});
    }
    const Epilogue<T, O, kActivation, same<T, bf16>> epilogue{w.bias, residual, y, nullptr, w.N};
    if constexpr (same<T, bf16>) {
      if (stored(w.precision)) return compressed_product(a, rows, w, epilogue);
    }
    product<T>(a, rows, w, epilogue);
  }

  // Rows of x, normalised, as the layer `next` takes them: in own.normed or own.quantized.
  void normalize(const float* x, int64_t rows, const Norm& norm, const Linear& next) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x + r * s.C;
      if (next.precision == Precision::int8) {
        norm_row(row, own.row, norm.weight, norm.bias, s.C, s.eps);
        own.quantized.scales[r] = quantize_row(own.row, s.C, own.quantized.bytes + r * s.C);
      } else {
        norm_row(row, own.normed + r * s.C, norm.weight, norm.bias, s.C, s.eps);
      }
    }
    clock.lap(Phase::norm);
  }

  // Rows of a, quantized where the layer `next` is.
  void quantize(const T* a, int64_t rows, const Linear& next) {
    if (next.precision != Precision::int8) return;
    for (int64_t r = 0; r < rows; ++r)
      own.quantized.scales[r] = quantize_row(a + r * next.K, next.K, own.quantized.bytes + r * next.K);
    clock.lap(Phase::quantize);
  }

  template <class X>
  void embed(const Images<X>& given) {
    const int64_t patches = s.patches(), stride = padded<T>(s.patch_values());
    const int64_t begin = part(images * patches, team.member, team.members);
    const int64_t end = part(images * patches, team.member + 1, team.members);
    for (int64_t unit = begin; unit < end;) {
      const int64_t b = unit / patches, p = unit % patches;
      const int64_t left = min(patches - p, end - unit), rows = ceil_div(left, ceil_div(left, kRows));
      float differences = 0;
      for (int64_t r = 0; r < rows; ++r)
        differences += given.gather(first + b, p + r, own.patches + r * stride, stride);
      if (!(differences == 0)) report_not_finite(first + b);
      float* x = tokens + (b * s.N() + s.prefix + p) * s.C;
      const Epilogue<T, float, Activation::none> epilogue{net.patch.bias, net.positions + p * s.C, x, nullptr, s.C};
      const Left rows_of_patches{reinterpret_cast<const char*>(own.patches), stride * static_cast<int64_t>(sizeof(T)),
                                 false};
      gemm_range<T, false>(rows_of_patches, net.patch.weight, s.C, steps_of<T>(net.patch.K), 0, rows, 0,
                           panels_of<T>(s.C), epilogue);
      unit += rows;
    }
    for (int64_t b = team.member; s.prefix > 0 && b < images; b += team.members)
      memcpy(tokens + b * s.N() * s.C, net.prefix, static_cast<size_t>(s.prefix * s.C) * sizeof(float));
    clock.lap(Phase::embed);
  }

  void report_not_finite(int64_t image) {
    int64_t known = __atomic_load_n(f.first_not_finite, __ATOMIC_RELAXED);
    while (image < known &&
           !__atomic_compare_exchange_n(f.first_not_finite, &known, image, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // Block l for images [b, b + count) of the pass.
  void layer(int64_t l, int64_t b, int64_t count) {
    const Block& w = net.blocks[l];
    const int64_t M = count * s.N(), C = s.C;
    float* x = tokens + b * s.N() * C;
    for_rows(M, [&](int64_t i0, int64_t i1) {
      normalize(x + i0 * C, i1 - i0, w.norm1, w.qkv);
      linear<Activation::none, T>(own.normed, i1 - i0, w.qkv, nullptr, qkv + i0 * 3 * C);
      clock.lap(Phase::qkv);
    });
    meet();
    attend(l, b, count);
    meet();
    for_rows(M, [&](int64_t i0, int64_t i1) {
      const int64_t rows = i1 - i0;
      float* y = x + i0 * C;
      quantize(attended + i0 * C, rows, w.proj);
      linear<Activation::none, float>(attended + i0 * C, rows, w.proj, y, y);
      clock.lap(Phase::proj);
      meet_columns();
      normalize(y, rows, w.norm2, w.fc1);
      with_activation(s.activation, [&](auto activation) {
        linear<decltype(activation)::value, T>(own.normed, rows, w.fc1, nullptr, shared_hidden);
      });
      clock.lap(Phase::fc1);
      meet_columns();
      quantize(shared_hidden, rows, w.fc2);
      linear<Activation::none, float>(shared_hidden, rows, w.fc2, y, y);
      clock.lap(Phase::fc2);
      meet_columns();
      if (f.tokens[l] && team.column == 0)
        memcpy(f.tokens[l] + ((first + b) * s.N() + i0) * C, y, static_cast<size_t>(rows * C) * sizeof(float));
    });
  }

  void attend(int64_t l, int64_t b, int64_t count) {
    AttentionFwd p = attention_of(s, count);
    p.q = qkv, p.k = qkv + s.C, p.v = qkv + 2 * s.C, p.out = attended;
    const int64_t units = attention_fwd_units(p);
    attention_fwd_range(p, own.scratch, part(units, team.member, team.members),
                        part(units, team.member + 1, team.members));
    if (f.attention[l])
      for (int64_t unit = team.member; unit < count * s.H; unit += team.members)
        class_attention(p, unit / s.H, unit % s.H, f.attention[l] + ((first + b) * s.H + unit) * s.N());
    clock.lap(Phase::attention);
  }

  // softmax(scale q k^T) of the class token, image b of the group, head h.
  void class_attention(const AttentionFwd& p, int64_t b, int64_t h, float* out) const {
    const T* q = static_cast<const T*>(p.q) + b * p.q_batch + h * p.q_head;
    const T* k = static_cast<const T*>(p.k) + b * p.k_batch + h * p.k_head;
    const float scale = static_cast<float>(p.scale * 1.44269504088896340736);
    float largest = -INFINITY;
    for (int64_t j = 0; j < p.N; ++j) {
      f32v dot{};
      for (int64_t d = 0; d < p.D; d += kLanes<float>)
        dot = fma(load<float>(q + d, p.D - d), load<float>(k + j * p.k_token + d, p.D - d), dot);
      out[j] = scale * sum(dot);
      largest = max(largest, out[j]);
    }
    f32v total{};
    for (int64_t j = 0; j < p.N; j += kLanes<float>) {
      const f32v e = keep(exp2<float>(load<float>(out + j, p.N - j) - largest), p.N - j, 0.0f);
      total += e;
      store<float>(out + j, e, p.N - j);
    }
    const float inverse = 1.0f / sum(total);
    for (int64_t j = 0; j < p.N; ++j) out[j] *= inverse;
  }

  // --- pooling, the last norm, the head -----------------------------------------------------------------------------

  void head() {
    if (s.pool == Pool::none) return head_of_tokens();
    for (int64_t b = team.member; b < images; b += team.members) {
      const float* x = tokens + b * s.N() * s.C;
      float* y = pooled + b * s.C;
      if (s.pool == Pool::average) {
        average(x + s.prefix * s.C, y);
        x = y;
      }
      if (s.pool == Pool::token || !s.norm_first) last_norm(x, y);
      write(f.features, (first + b) * s.C, y, s.C);
      if (!s.classes) write(f.logits, (first + b) * s.C, y, s.C);
    }
    meet();
    if (s.classes && f.logits) {
      const int64_t panels = panels_of<float>(s.classes);
      classify(pooled, images, f.logits + first * s.classes, part(panels, team.member, team.members),
               part(panels, team.member + 1, team.members));
    }
    clock.lap(Phase::head);
  }

  // Without pooling every token has its logits.
  void head_of_tokens() {
    const int64_t rows = images * s.N(), base = first * s.N();
    float* normed = normed_tokens;
    const int64_t begin = part(rows, team.member, team.members), end = part(rows, team.member + 1, team.members);
    for (int64_t i = begin; i < end; i += kRows) {
      const int64_t n = min(kRows, end - i);
      for (int64_t r = 0; r < n; ++r) last_norm(tokens + (i + r) * s.C, normed + r * s.C);
      write(f.features, (base + i) * s.C, normed, n * s.C);
      if (!s.classes) write(f.logits, (base + i) * s.C, normed, n * s.C);
      if (s.classes && f.logits) classify(normed, n, f.logits + (base + i) * s.classes, 0, panels_of<float>(s.classes));
    }
    clock.lap(Phase::head);
  }

  void classify(const float* features, int64_t rows, float* logits, int64_t panel_begin, int64_t panel_end) const {
    const Left left{reinterpret_cast<const char*>(features), s.C * static_cast<int64_t>(sizeof(float)), false};
    gemm_range<float, false>(
        left, net.head.weight, s.classes, s.C, 0, rows, panel_begin, panel_end,
        Epilogue<float, float, Activation::none>{net.head.bias, nullptr, logits, nullptr, s.classes});
  }

  // y = the mean of the patch tokens x, or of what the last norm makes of them.
  void average(const float* x, float* y) const {
    const auto for_vectors = [&](const auto& f) {
      for (int64_t j = 0; j < s.C; j += kLanes<float>) f(j, s.C - j);
    };
    memset(y, 0, static_cast<size_t>(s.C) * sizeof(float));
    for (int64_t i = 0; i < s.patches(); ++i) {
      const float* row = x + i * s.C;
      if (s.norm_first) last_norm(row, own.row);
      if (s.norm_first) row = own.row;
      for_vectors(
          [&](int64_t j, int64_t n) { store<float>(y + j, load<float>(y + j, n) + load<float>(row + j, n), n); });
    }
    const float scale = 1.0f / static_cast<float>(s.patches());
    for_vectors([&](int64_t j, int64_t n) { store<float>(y + j, scale * load<float>(y + j, n), n); });
  }

  void last_norm(const float* x, float* y) const { norm_row(x, y, net.norm.weight, net.norm.bias, s.C, s.eps); }

  static void write(float* out, int64_t at, const float* values, int64_t count) {
    if (out) memcpy(out + at, values, static_cast<size_t>(count) * sizeof(float));
  }
};

template <class T>
void forward(const Forward& f) {
  struct Region {
    const Forward& f;
    Buffers<T> memory;
    Share share;
  } region{f, Buffers<T>(f.network->shape, f.B, f.threads, f.arena), Share(f.network->shape, f.B, f.threads)};
  run_threads(
      f.threads,
      [](void* data, int thread, int threads) {
        const Region& region = *static_cast<const Region*>(data);
        const Forward& f = region.f;
        const Shape& s = f.network->shape;
        Clock clock(thread == 0 ? f.seconds : nullptr);
        const int64_t whole = f.B / threads;  // images of each thread alone
        for (int64_t i = 0; i < whole; i += region.share.images) {
          const int64_t images = min(region.share.images, whole - i);
          Pass<T>(f, region.memory, Team(), thread, clock, thread * whole + i, images, region.share.group).run();
        }
        const int64_t rest = f.B - threads * whole;
        if (rest == 0) return;
        f.barriers[0].wait(threads);  // slices of other threads become part of the common memory
        const Team team = Team::of<T>(thread, threads, rest * s.N(), s.C, f.barriers);
        Pass<T>(f, region.memory, team, thread, clock, threads * whole, rest, rest).run();
      },
      &region);
}

}  // namespace

int64_t engine_bytes(const Network& network, int64_t B, int threads) {
  const Shape& s = network.shape;
  return s.precision == Precision::float32 ? Buffers<float>(s, B, threads, nullptr).bytes
                                           : Buffers<bf16>(s, B, threads, nullptr).bytes;
}

void engine_forward(const Forward& f) {
  f.network->shape.precision == Precision::float32 ? forward<float>(f) : forward<bf16>(f);
}

}  // namespace vit::VIT_ISA
