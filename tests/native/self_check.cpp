// Runs every op of vit.h, forward and backward, against plain loops in double: without Python, so that it also runs on
// a processor that is only emulated, and shows how a C++ program calls the library.
//
// A value passes when it differs from the truth by at most 32 roundings of the accumulator (the longest sums here have
// about a hundred terms of size one) plus 4 roundings of the output type.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "vit.h"

using namespace vit;
using Values = std::vector<double>;

namespace {

int failures = 0, checks = 0;

std::size_t bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
DType accumulator(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
double epsilon(DType dtype) {
  return std::ldexp(1.0, dtype == DType::float64 ? -52 : dtype == DType::float32 ? -23 : -7);
}
const char* name(DType dtype) {
  return dtype == DType::float64 ? "float64" : dtype == DType::float32 ? "float32" : "bfloat16";
}

void store(DType dtype, double value, unsigned char* at) {
  const float single = static_cast<float>(value);
  if (dtype == DType::float64) std::memcpy(at, &value, 8);
  if (dtype == DType::float32) std::memcpy(at, &single, 4);
  if (dtype != DType::bfloat16) return;
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  const auto half = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
  std::memcpy(at, &half, 2);
}

double load(DType dtype, const unsigned char* at) {
  double value = 0;
  float single = 0;
  uint16_t half = 0;
  if (dtype == DType::float64) return std::memcpy(&value, at, 8), value;
  if (dtype == DType::float32) return std::memcpy(&single, at, 4), single;
  std::memcpy(&half, at, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  return std::memcpy(&single, &bits, 4), single;
}

// An array in a dtype of the library.
struct Array {
  DType dtype;
  std::vector<unsigned char> storage;

  Array(DType dtype, const Values& values) : dtype(dtype), storage(values.size() * bytes(dtype)) {
    for (std::size_t i = 0; i < values.size(); ++i) store(dtype, values[i], &storage[i * bytes(dtype)]);
  }
  // An output: NaN everywhere, so that what a kernel leaves out is seen.
  Array(DType dtype, int64_t n) : Array(dtype, Values(static_cast<std::size_t>(n), NAN)) {}

  void* data() { return storage.data(); }
  // The values as stored, rounded to the dtype.
  Values values() const {
    Values out(storage.size() / bytes(dtype));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = load(dtype, &storage[i * bytes(dtype)]);
    return out;
  }
};

Array random(DType dtype, int64_t n) {
  static std::mt19937 generator(0);
  Values values(static_cast<std::size_t>(n));
  for (double& value : values) value = std::uniform_real_distribution<double>(-1, 1)(generator);
  return Array(dtype, values);
}

// `terms` is the size of the largest terms of the sums that make up a value, `noise` an error they have by design.
void expect(const std::string& what, const Array& got, const Values& truth, DType dtype, double terms = 1,
            double noise = 0) {
  double largest = 0, error = 0;
  for (double value : truth) largest = std::fmax(largest, std::fabs(value));
  const double bound = noise + 32 * epsilon(accumulator(dtype)) * (terms + largest) + 4 * epsilon(got.dtype) * largest;
  const Values values = got.values();
  for (std::size_t i = 0; i < truth.size(); ++i) {
    const double difference = std::fabs(values[i] - truth[i]);
    error = std::isnan(difference) ? INFINITY : std::fmax(error, difference);
  }
  ++checks;
  if (error <= bound) return;
  ++failures;
  std::printf("FAILED %s %s: error %.3g, allowed %.3g\n", what.c_str(), name(dtype), error, bound);
}

struct Case {
  DType dtype;
  Context context;
};

// Workspace of the size the library asks for; its contents are arbitrary.
template <class P>
std::vector<unsigned char> workspace(std::size_t (*size)(const P&), P& p) {
  std::vector<unsigned char> memory(size(p) + 64, 0xff);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  p.workspace = memory.data() + (64 - address % 64) % 64;
  return memory;
}

void layer_norm(const Case& c, int64_t M, int64_t C) {
  const double eps = 1e-6;
  Array x = random(c.dtype, M * C), w = random(c.dtype, C), b = random(c.dtype, C), dy = random(c.dtype, M * C);
  const DType acc = accumulator(c.dtype);
  Array y(c.dtype, M * C), mean(acc, M), rstd(acc, M), dx(c.dtype, M * C), dw(c.dtype, C), db(c.dtype, C);
  layer_norm_fwd(
      {x.data(), w.data(), b.data(), y.data(), mean.data(), rstd.data(), M, C, C, eps, c.dtype, c.dtype, c.context});
  LayerNormBwd p{dy.data(), x.data(), w.data(), mean.data(), rstd.data(), dx.data(), dw.data(), db.data(),
                 nullptr,   M,        C,        C,           c.dtype,     c.dtype,   c.context};
  const auto memory = workspace(layer_norm_bwd_workspace, p);
  layer_norm_bwd(p);

  const Values xs = x.values(), ws = w.values(), bs = b.values(), dys = dy.values();
  Values ty(M * C), tmean(M), trstd(M), tdx(M * C), tdw(C), tdb(C);
  for (int64_t m = 0; m < M; ++m) {
    double variance = 0, along = 0, sum = 0;
    for (int64_t i = 0; i < C; ++i) tmean[m] += xs[m * C + i] / C;
    for (int64_t i = 0; i < C; ++i) variance += std::pow(xs[m * C + i] - tmean[m], 2) / C;
    trstd[m] = 1 / std::sqrt(variance + eps);
    const auto normal = [&](int64_t i) { return (xs[m * C + i] - tmean[m]) * trstd[m]; };
    for (int64_t i = 0; i < C; ++i) {
      ty[m * C + i] = normal(i) * ws[i] + bs[i];
      tdw[i] += dys[m * C + i] * normal(i);
      tdb[i] += dys[m * C + i];
      sum += dys[m * C + i] * ws[i] / C;
      along += dys[m * C + i] * ws[i] * normal(i) / C;
    }
    for (int64_t i = 0; i < C; ++i) tdx[m * C + i] = trstd[m] * (dys[m * C + i] * ws[i] - sum - normal(i) * along);
  }
  const std::string id = "layer_norm " + std::to_string(M) + "x" + std::to_string(C);
  expect(id + " y", y, ty, c.dtype);
  expect(id + " mean", mean, tmean, c.dtype);
  expect(id + " rstd", rstd, trstd, c.dtype);
  expect(id + " dx", dx, tdx, c.dtype, *std::max_element(trstd.begin(), trstd.end()));
  expect(id + " dweight", dw, tdw, c.dtype);
  expect(id + " dbias", db, tdb, c.dtype);
}

double activate(Activation activation, double x) {
  if (activation == Activation::gelu) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  if (activation == Activation::none) return x;
  if (activation == Activation::quick_gelu) return x / (1 + std::exp(-1.702 * x));
  if (activation == Activation::silu) return x / (1 + std::exp(-x));
  if (activation == Activation::relu) return std::max(x, 0.0);
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double slope(Activation activation, double x) {
  if (activation == Activation::none) return 1;
  if (activation == Activation::relu) return x > 0;
  if (activation == Activation::quick_gelu || activation == Activation::silu) {
    const double c = activation == Activation::silu ? 1 : 1.702, gate = 1 / (1 + std::exp(-c * x));
    return gate + c * x * gate * gate * std::exp(-c * x);
  }
  if (activation == Activation::gelu)
    return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
  const double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

void gelu(const Case& c, int64_t n, Activation activation) {
  Array x = random(c.dtype, n), dy = random(c.dtype, n), y(c.dtype, n), dx(c.dtype, n);
  Values wide = x.values();
  for (double& value : wide) value *= 8;  // the tails as well
  x = Array(c.dtype, wide);
  gelu_fwd({x.data(), y.data(), n, activation, c.dtype, c.context});
  gelu_bwd({dy.data(), x.data(), dx.data(), n, activation, c.dtype, c.context});

  const Values xs = x.values(), dys = dy.values();
  Values ty(n), tdx(n);
  for (int64_t i = 0; i < n; ++i) {
    ty[i] = activate(activation, xs[i]);
    tdx[i] = dys[i] * slope(activation, xs[i]);
  }
  const std::string id = "activation " + std::to_string(static_cast<int>(activation)) + " " + std::to_string(n);
  expect(id + " y", y, ty, c.dtype);
  expect(id + " dx", dx, tdx, c.dtype);
}

// `a` is given transposed: columns adjacent. `b` is one matrix for the whole batch.
void matmul(const Case& c, int64_t batch, int64_t M, int64_t N, int64_t K) {
  Array a = random(c.dtype, batch * K * M), b = random(c.dtype, K * N), dy = random(c.dtype, batch * M * N);
  Array y(c.dtype, batch * M * N), da(c.dtype, batch * M * K), db(c.dtype, batch * K * N);
  const Matrix at{a.data(), K * M, 1, M}, one{b.data(), 0, N, 1};
  MatmulFwd p{at, one, y.data(), nullptr, batch, M, N, K, c.dtype, c.context};
  const auto memory = workspace(matmul_fwd_workspace, p);
  matmul_fwd(p);
  MatmulBwd q{dy.data(), at, one, da.data(), db.data(), nullptr, batch, M, N, K, c.dtype, c.context};
  const auto more = workspace(matmul_bwd_workspace, q);
  matmul_bwd(q);

  const Values as = a.values(), bs = b.values(), dys = dy.values();
  Values ty(batch * M * N), tda(batch * M * K), tdb(batch * K * N);
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) {
          const double left = as[i * K * M + k * M + m], right = bs[k * N + n], grad = dys[(i * M + m) * N + n];
          ty[(i * M + m) * N + n] += left * right;
          tda[(i * M + m) * K + k] += grad * right;
          tdb[(i * K + k) * N + n] += grad * left;
        }
  const std::string id =
      "matmul " + std::to_string(batch) + "x" + std::to_string(M) + "x" + std::to_string(N) + "x" + std::to_string(K);
  expect(id + " c", y, ty, c.dtype);
  expect(id + " da", da, tda, c.dtype);
  expect(id + " db", db, tdb, c.dtype);
}

void swiglu(const Case& c, int64_t M, int64_t C) {
  Array x = random(c.dtype, M * 2 * C), dy = random(c.dtype, M * C), y(c.dtype, M * C), dx(c.dtype, M * 2 * C);
  const int64_t size = c.dtype == DType::float64 ? 8 : c.dtype == DType::float32 ? 4 : 2;
  char *gates = static_cast<char*>(x.data()), *dgates = static_cast<char*>(dx.data());
  swiglu_fwd({gates + C * size, gates, y.data(), M, C, 2 * C, 2 * C, c.dtype, c.context});
  swiglu_bwd({dy.data(), gates + C * size, gates, dgates + C * size, dgates, M, C, 2 * C, 2 * C, 2 * C, 2 * C, c.dtype,
              c.context});

  const Values xs = x.values(), dys = dy.values();
  Values ty(M * C), tdx(M * 2 * C);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < C; ++i) {
      const double gate = xs[m * 2 * C + i], value = xs[m * 2 * C + C + i], grad = dys[m * C + i];
      ty[m * C + i] = activate(Activation::silu, gate) * value;
      tdx[m * 2 * C + i] = grad * value * slope(Activation::silu, gate);
      tdx[m * 2 * C + C + i] = grad * activate(Activation::silu, gate);
    }
  const std::string id = "swiglu " + std::to_string(M) + "x" + std::to_string(C);
  expect(id + " y", y, ty, c.dtype);
  expect(id + " dx", dx, tdx, c.dtype);
}

void rms_norm(const Case& c, int64_t M, int64_t C) {
  Array x = random(c.dtype, M * C), w = random(c.dtype, C), dy = random(c.dtype, M * C), y(c.dtype, M * C);
  Array dx(c.dtype, M * C), dw(c.dtype, C);
  const DType acc = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  Array rstd(acc, M);
  const double eps = 1e-6;
  rms_norm_fwd({x.data(), w.data(), y.data(), rstd.data(), M, C, C, eps, c.dtype, c.dtype, c.context});
  RmsNormBwd q{dy.data(), x.data(), w.data(), rstd.data(), dx.data(), dw.data(), nullptr,
               M,         C,        C,        c.dtype,     c.dtype,   c.context};
  const auto memory = workspace(rms_norm_bwd_workspace, q);
  rms_norm_bwd(q);

  const Values xs = x.values(), ws = w.values(), dys = dy.values();
  Values ty(M * C), tdx(M * C), tdw(C);
  double largest = 0;
  for (int64_t m = 0; m < M; ++m) {
    double squares = 0, mean = 0;
    for (int64_t i = 0; i < C; ++i) squares += xs[m * C + i] * xs[m * C + i];
    const double scale = 1 / std::sqrt(squares / C + eps);
    largest = std::max(largest, scale);
    for (int64_t i = 0; i < C; ++i) mean += dys[m * C + i] * ws[i] * xs[m * C + i] * scale / C;
    for (int64_t i = 0; i < C; ++i) {
      const double xhat = xs[m * C + i] * scale;
      ty[m * C + i] = xhat * ws[i];
      tdx[m * C + i] = scale * (dys[m * C + i] * ws[i] - xhat * mean);
      tdw[i] += dys[m * C + i] * xhat;
    }
  }
  const std::string id = "rms_norm " + std::to_string(M) + "x" + std::to_string(C);
  expect(id + " y", y, ty, c.dtype);
  expect(id + " dx", dx, tdx, c.dtype, largest);
  expect(id + " dweight", dw, tdw, c.dtype);
}

// One table for all samples and heads; the first token stays.
void rotary(const Case& c, int64_t B, int64_t N, int64_t H, int64_t D, Pairing pairing) {
  const int64_t size = B * N * H * D, rows = N - 1;
  Array x = random(c.dtype, size), table = random(c.dtype, rows * 2 * D), dy = random(c.dtype, size);
  Array y(c.dtype, size), dx(c.dtype, size), dtable(c.dtype, rows * 2 * D);
  const auto heads = [&](Array& a) { return Heads{a.data(), N * H * D, H * D, D}; };
  const auto written = [&](Array& a) { return MutableHeads{a.data(), N * H * D, H * D, D}; };
  const Heads angles{table.data(), 0, 2 * D, 0};
  rotary_fwd({heads(x), angles, written(y), B, N, H, D, 1, pairing, c.dtype, c.dtype, c.context});
  rotary_bwd({heads(dy), heads(x), angles, written(dx), dtable.data(), B, N, H, D, 1, 1, 1, pairing, c.dtype, c.dtype,
              c.context});

  const Values xs = x.values(), ts = table.values(), dys = dy.values();
  Values ty = xs, tdx = dys, tdt(rows * 2 * D);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t d = i % D, n = i / (H * D) % N, half = D / 2;
    if (n == 0) continue;
    const bool first = pairing == Pairing::half ? d < half : d % 2 == 0;
    const int64_t partner = pairing == Pairing::half ? (first ? d + half : d - half) : d ^ 1, j = i - d + partner;
    const double sign = first ? -1 : 1;
    const int64_t sin = (n - 1) * 2 * D, cos = sin + D;
    ty[i] = xs[i] * ts[cos + d] + sign * xs[j] * ts[sin + d];
    tdx[i] = dys[i] * ts[cos + d] - sign * dys[j] * ts[sin + partner];
    tdt[sin + d] += dys[i] * sign * xs[j];
    tdt[cos + d] += dys[i] * xs[i];
  }
  const std::string id = "rotary " + std::to_string(D) + (pairing == Pairing::half ? " half" : " interleaved");
  expect(id + " y", y, ty, c.dtype);
  expect(id + " dx", dx, tdx, c.dtype);
  expect(id + " dtable", dtable, tdt, c.dtype);
}

void linear(const Case& c, int64_t M, int64_t N, int64_t K, Activation activation) {
  const bool active = activation != Activation::none;
  const DType acc = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  Array scale = random(acc, N), dscale(acc, N);
  Array x = random(c.dtype, M * K), w = random(c.dtype, N * K), b = random(c.dtype, N), r = random(c.dtype, M * N);
  Array dy = random(c.dtype, M * N), y(c.dtype, M * N), pre(c.dtype, M * N);
  Array dx(c.dtype, M * K), dw(c.dtype, N * K), db(c.dtype, N);
  LinearFwd p{x.data(), w.data(), b.data(), scale.data(), r.data(), y.data(), pre.data(), nullptr,  M, N,
              K,        K,        K,        activation,   c.dtype,  c.dtype,  c.dtype,    c.context};
  const auto memory = workspace(linear_fwd_workspace, p);
  linear_fwd(p);

  const Values xs = x.values(), ws = w.values(), bs = b.values(), rs = r.values(), dys = dy.values();
  const Values scales = scale.values();
  Values tpre(M * N), ty(M * N), tdx(M * K), tdw(N * K), tdb(N), tds(N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = bs[n];
      for (int64_t k = 0; k < K; ++k) sum += xs[m * K + k] * ws[n * K + k];
      tpre[m * N + n] = sum;
      ty[m * N + n] = scales[n] * activate(activation, sum) + rs[m * N + n];
    }
  const std::string id =
      "linear " + std::to_string(M) + "x" + std::to_string(N) + "x" + std::to_string(K) + (active ? " gelu" : "");
  expect(id + " preact", pre, tpre, c.dtype);
  pre = Array(c.dtype, tpre);  // the backward starts from the true value, so that its own error is what is seen
  LinearBwd q{dy.data(),
              x.data(),
              w.data(),
              scale.data(),
              pre.data(),
              dx.data(),
              dw.data(),
              db.data(),
              dscale.data(),
              nullptr,
              M,
              N,
              K,
              K,
              K,
              activation,
              c.dtype,
              c.dtype,
              c.dtype,
              c.context};
  const auto more = workspace(linear_bwd_workspace, q);
  linear_bwd(q);

  const Values pres = pre.values();
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      const double grad = scales[n] * dys[m * N + n] * (active ? slope(activation, pres[m * N + n]) : 1);
      tds[n] += dys[m * N + n] * activate(activation, pres[m * N + n]);
      tdb[n] += grad;
      for (int64_t k = 0; k < K; ++k) {
        tdx[m * K + k] += grad * ws[n * K + k];
        tdw[n * K + k] += grad * xs[m * K + k];
      }
    }
  expect(id + " y", y, ty, c.dtype);
  expect(id + " dx", dx, tdx, c.dtype);
  expect(id + " dweight", dw, tdw, c.dtype);
  expect(id + " dbias", db, tdb, c.dtype);
  // float32 sums of activations that are exact to what rounds to bfloat16.
  expect(id + " dscale", dscale, tds, c.dtype, 1, active && c.dtype == DType::bfloat16 ? 1e-4 : 0);
}

// q, k and v are views of one packed [B, N, 3, H, D] projection, and so are their gradients.
void attention(const Case& c, int64_t B, int64_t N, int64_t H, int64_t D) {
  const int64_t token = 3 * H * D, batch = N * token;
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  Array qkv = random(c.dtype, B * batch), dout = random(c.dtype, B * N * H * D), dqkv(c.dtype, B * batch);
  Array out(c.dtype, B * N * H * D), stats(accumulator(c.dtype), B * H * 2 * N);
  const auto part = [&](Array& packed, int i) -> MutableHeads {
    auto* data = static_cast<unsigned char*>(packed.data()) + static_cast<std::size_t>(i * H * D) * bytes(c.dtype);
    return {data, batch, token, D};
  };
  const auto given = [&](int i) -> Heads { return {part(qkv, i).data, batch, token, D}; };
  AttentionFwd p{given(0), given(1), given(2), out.data(), stats.data(), nullptr, B,
                 N,        N,        H,        D,          scale,        c.dtype, c.context};
  const auto memory = workspace(attention_fwd_workspace, p);
  attention_fwd(p);
  const auto gradient = [&](int i) { return part(dqkv, i); };
  AttentionBwd q{dout.data(), given(0),    given(1),    given(2), out.data(), stats.data(),
                 gradient(0), gradient(1), gradient(2), nullptr,  B,          N,
                 N,           H,           D,           scale,    c.dtype,    c.context};
  const auto more = workspace(attention_bwd_workspace, q);
  attention_bwd(q);
  const int64_t chosen[] = {N - 1, 0}, R = 2;
  Array rows(accumulator(c.dtype), B * H * R * N);
  AttentionRows r{given(0), given(1), chosen,   {rows.data(), H * R * N, N, R * N}, nullptr, B, N, R, N, H, D,
                  scale,    c.dtype,  c.context};
  const auto room = workspace(attention_rows_workspace, r);
  attention_rows(r);

  const Values xs = qkv.values(), dos = dout.values();
  Values tout(B * N * H * D), tstats(B * H * 2 * N), tgrad(B * batch), trows(B * H * R * N);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t n = 0; n < N; ++n) {
        const auto at = [&](int64_t row, int64_t i) { return b * batch + row * token + (i * H + h) * D; };
        const int64_t row = ((b * N + n) * H + h) * D;
        Values weight(N);
        double sum = 0, delta = 0, top = -INFINITY;
        for (int64_t l = 0; l < N; ++l) {
          double product = 0;
          for (int64_t d = 0; d < D; ++d) product += xs[at(n, 0) + d] * xs[at(l, 1) + d];
          sum += weight[l] = std::exp(scale * product);
          top = std::fmax(top, product);
        }
        tstats[(b * H + h) * 2 * N + n] = top;
        tstats[(b * H + h) * 2 * N + N + n] = std::exp(scale * top) / sum;
        for (double& value : weight) value /= sum;
        for (int64_t i = 0; i < R; ++i)
          if (chosen[i] == n) std::copy(weight.begin(), weight.end(), &trows[((b * H + h) * R + i) * N]);
        for (int64_t l = 0; l < N; ++l)
          for (int64_t d = 0; d < D; ++d) tout[row + d] += weight[l] * xs[at(l, 2) + d];
        for (int64_t d = 0; d < D; ++d) delta += dos[row + d] * tout[row + d];
        for (int64_t l = 0; l < N; ++l) {
          double dweight = 0;
          for (int64_t d = 0; d < D; ++d) dweight += dos[row + d] * xs[at(l, 2) + d];
          const double dscore = scale * weight[l] * (dweight - delta);
          for (int64_t d = 0; d < D; ++d) {
            tgrad[at(n, 0) + d] += dscore * xs[at(l, 1) + d];
            tgrad[at(l, 1) + d] += dscore * xs[at(n, 0) + d];
            tgrad[at(l, 2) + d] += weight[l] * dos[row + d];
          }
        }
      }
  const std::string id =
      "attention " + std::to_string(B) + "x" + std::to_string(N) + "x" + std::to_string(H) + "x" + std::to_string(D);
  expect(id + " out", out, tout, c.dtype);
  // The exponentials behind a bfloat16 probability are exact to 1/64 of its epsilon (csrc/cpu/functions.h: 8e-5), and
  // so is the inverse of their sum, which is at most 1.
  expect(id + " stats", stats, tstats, c.dtype, 1, c.dtype == DType::bfloat16 ? epsilon(DType::bfloat16) / 64 : 0);
  expect(id + " gradients", dqkv, tgrad, c.dtype);
  expect(id + " rows", rows, trows, c.dtype);
}

void bad_arguments_throw() {
  ++checks;
  try {
    gelu_fwd({nullptr, nullptr, 4, Activation::gelu, DType::float32, {}});
  } catch (const Error&) {
    return;
  }
  ++failures;
  std::printf("FAILED gelu_fwd took null pointers\n");
}

}  // namespace

int main() {
  for (const auto& [key, value] : info()) std::printf("%-14s %s\n", key.c_str(), value.c_str());
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16})
    for (int threads : {1, 3}) {
      const Case c{dtype, {nullptr, 0, threads}};
      for (int64_t C : {1, 7, 64, 129}) layer_norm(c, 9, C);
      for (int64_t n : {1, 31, 1000})
        for (Activation activation :
             {Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu, Activation::silu, Activation::relu})
          gelu(c, n, activation);
      for (int64_t C : {1, 7, 64, 129}) rms_norm(c, 9, C);
      for (int64_t C : {1, 7, 64, 129}) swiglu(c, 9, C);
      for (Pairing pairing : {Pairing::interleaved, Pairing::half})
        for (int64_t D : {2, 20, 64}) rotary(c, 2, 5, 3, D, pairing);
      matmul(c, 1, 1, 1, 1);
      matmul(c, 2, 13, 17, 31);
      matmul(c, 1, 64, 96, 128);
      for (Activation activation : {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
        linear(c, 1, 5, 3, activation);
        linear(c, 37, 41, 43, activation);
        linear(c, 64, 96, 64, activation);
      }
      attention(c, 1, 1, 1, 8);
      attention(c, 2, 19, 3, 20);
      attention(c, 1, 65, 2, 64);
    }
  bad_arguments_throw();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
