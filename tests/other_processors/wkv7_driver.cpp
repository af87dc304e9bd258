// wkv7's CPU kernel against the recurrence written out in double, without PyTorch: for instruction sets and processors that PyTorch isn't
// installed for (run under an emulator). Exit 1 with a line for each number that is off, else the worst errors in one line.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include <torch/headeronly/util/Half.h>

#include "wkv7_cpu.h"

namespace {

using wkv7_cpu::Dtype;
using Values = std::vector<double>;

constexpr char kGuard = 0x5B;
int failures = 0;

void expect(bool holds, const char* what, const char* of) {
  if (!holds) std::printf("%s %s\n", what, of), ++failures;
}

// ---- tensors as the kernel has them: `offset` bytes past a cache line, with a guard behind -------------------------------------------------

int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

class Memory {
 public:
  Memory(int64_t numel, Dtype dtype, int64_t offset = 0)
      : dtype_(dtype), numel_(numel), offset_(offset), bytes_(numel * size_of(dtype) + 192, kGuard) {}
  char* data() {
    auto at = reinterpret_cast<uintptr_t>(bytes_.data());
    return bytes_.data() + (64 - at % 64) % 64 + offset_;
  }
  float* floats() { return reinterpret_cast<float*>(data()); }
  bool guard_is_whole() {
    for (int64_t i = 0; i < 64 - offset_; ++i)
      if (data()[numel_ * size_of(dtype_) + i] != kGuard) return false;
    return true;
  }
  void set(int64_t i, double value) {
    const float x = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t bf16 = std::isnan(x) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const torch::headeronly::Half half(x);
    const void* from = dtype_ == Dtype::f32 ? static_cast<const void*>(&x) : dtype_ == Dtype::bf16 ? static_cast<const void*>(&bf16) : &half;
    std::memcpy(data() + i * size_of(dtype_), from, size_of(dtype_));
  }
  double get(int64_t i) {
    const char* from = data() + i * size_of(dtype_);
    if (dtype_ == Dtype::f16) {
      torch::headeronly::Half half;
      std::memcpy(&half, from, 2);
      return static_cast<float>(half);
    }
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size_of(dtype_), from, size_of(dtype_));
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  Values values() {
    Values all(numel_);
    for (int64_t i = 0; i < numel_; ++i) all[i] = get(i);
    return all;
  }

 private:
  Dtype dtype_;
  int64_t numel_, offset_;
  std::vector<char> bytes_;
};

// ---- the recurrence, one head of one sequence ---------------------------------------------------------------------------------------------

enum Input { R, W, K, V, A, B, INPUTS };
const char* kNames[] = {"y", "final", "dr", "dw", "dk", "dv", "da", "db", "dstate"};
const char* kInputNames[] = {"r", "w", "k", "v", "a", "b"};
enum Output { Y, FINAL, GRADIENTS, DSTATE = GRADIENTS + INPUTS, OUTPUTS };
bool is_state(int output) { return output == FINAL || output == DSTATE; }

struct Sizes {
  int64_t B, T, H, N;
  std::vector<int32_t> bounds;  // cu_seqlens, or empty
  int64_t documents() const { return bounds.empty() ? B : static_cast<int64_t>(bounds.size()) - 1; }
  int64_t numel() const { return B * T * H * N; }
  int64_t states() const { return documents() * H * N * N; }
};

void exact(const Sizes& s, const Values (&in)[INPUTS], const Values& state, const Values& dy, const Values& dfinal, Values (&out)[OUTPUTS]) {
  const int64_t N = s.N;
  for (int i = 0; i < OUTPUTS; ++i) out[i].assign(is_state(i) ? s.states() : s.numel(), 0.0);
  const double rate = std::exp(-0.5);
  for (int64_t document = 0; document < s.documents(); ++document)
    for (int64_t head = 0; head < s.H; ++head) {
      const int64_t batch = s.bounds.empty() ? document : 0, at_state = (document * s.H + head) * N * N;
      const int64_t begin = s.bounds.empty() ? 0 : s.bounds[document], end = s.bounds.empty() ? s.T : s.bounds[document + 1];
      auto row = [&](int64_t t) { return ((batch * s.T + t) * s.H + head) * N; };
      std::vector<Values> S(end - begin + 1, Values(N * N)), sa(end - begin, Values(N));
      std::copy_n(state.begin() + at_state, N * N, S[0].begin());
      auto decay = [&](int64_t t, int64_t j) { return std::exp(-rate / (1 + std::exp(-in[W][row(t) + j]))); };
      for (int64_t t = begin; t < end; ++t) {
        const Values& before = S[t - begin];
        Values& after = S[t - begin + 1];
        const int64_t at = row(t);
        Values decays(N);
        for (int64_t j = 0; j < N; ++j) decays[j] = decay(t, j);
        for (int64_t i = 0; i < N; ++i) {
          double removed = 0, y = 0;
          for (int64_t j = 0; j < N; ++j) removed += before[i * N + j] * in[A][at + j];
          sa[t - begin][i] = removed;
          for (int64_t j = 0; j < N; ++j) {
            after[i * N + j] = before[i * N + j] * decays[j] + removed * in[B][at + j] + in[V][at + i] * in[K][at + j];
            y += after[i * N + j] * in[R][at + j];
          }
          out[Y][at + i] = y;
        }
      }
      std::copy(S.back().begin(), S.back().end(), out[FINAL].begin() + at_state);
      Values G(dfinal.begin() + at_state, dfinal.begin() + at_state + N * N);
      for (int64_t t = end; t-- > begin;) {
        const Values &before = S[t - begin], &after = S[t - begin + 1];
        const int64_t at = row(t);
        for (int64_t i = 0; i < N; ++i)
          for (int64_t j = 0; j < N; ++j) {
            out[GRADIENTS + R][at + j] += after[i * N + j] * dy[at + i];
            G[i * N + j] += dy[at + i] * in[R][at + j];
          }
        Values ddecay(N), decays(N);
        for (int64_t j = 0; j < N; ++j) decays[j] = decay(t, j);
        for (int64_t i = 0; i < N; ++i) {
          double dsa = 0, dv = 0;
          for (int64_t j = 0; j < N; ++j) {
            const double g = G[i * N + j];
            dv += g * in[K][at + j], dsa += g * in[B][at + j];
            out[GRADIENTS + K][at + j] += g * in[V][at + i];
            out[GRADIENTS + B][at + j] += g * sa[t - begin][i];
            ddecay[j] += g * before[i * N + j];
          }
          out[GRADIENTS + V][at + i] = dv;
          for (int64_t j = 0; j < N; ++j) {
            out[GRADIENTS + A][at + j] += dsa * before[i * N + j];
            G[i * N + j] = G[i * N + j] * decays[j] + dsa * in[A][at + j];
          }
        }
        for (int64_t j = 0; j < N; ++j) {
          const double sigmoid = 1 / (1 + std::exp(-in[W][at + j]));
          out[GRADIENTS + W][at + j] = -rate * sigmoid * (1 - sigmoid) * decays[j] * ddecay[j];
        }
      }
      std::copy(G.begin(), G.end(), out[DSTATE].begin() + at_state);
    }
}

// ---- the kernel ---------------------------------------------------------------------------------------------------------------------------

struct Inputs {
  std::vector<Memory> in;  // each [B, T, H, N] with `gap` numbers between heads
  Memory dy, state, dfinal;
  int64_t gap;
};

wkv7_cpu::Rows rows(Memory& memory, const Sizes& s, int64_t gap) {
  const int64_t head = s.N + gap;
  return {memory.data(), s.T * s.H * head, s.H * head, head};
}

void run(const Sizes& s, Dtype dtype, Inputs& x, bool with_state, int64_t offset, Values (&out)[OUTPUTS]) {
  wkv7_cpu::Forward f{};
  f.B = s.B, f.T = s.T, f.H = s.H, f.N = s.N, f.dtype = dtype;
  f.cu_seqlens = s.bounds.empty() ? nullptr : s.bounds.data(), f.documents = s.documents();
  f.r = rows(x.in[R], s, x.gap), f.w = rows(x.in[W], s, x.gap), f.k = rows(x.in[K], s, x.gap);
  f.v = rows(x.in[V], s, x.gap), f.a = rows(x.in[A], s, x.gap), f.b = rows(x.in[B], s, x.gap);
  f.state = with_state ? x.state.floats() : nullptr;
  std::vector<Memory> made;
  for (int i = 0; i < OUTPUTS; ++i)
    is_state(i) ? made.emplace_back(s.states(), Dtype::f32, offset) : made.emplace_back(s.numel(), dtype, offset);
  Memory saved_state(saved_states(f) * s.H * s.N * s.N, Dtype::f32, offset), saved_sa(s.numel(), Dtype::f32, offset);
  f.y = made[Y].data(), f.final_state = made[FINAL].floats(), f.saved_state = saved_state.floats(), f.saved_sa = saved_sa.floats();
  for (int64_t unit = 0; unit < f.units(); ++unit) forward_unit(f, unit);

  wkv7_cpu::Backward b{};
  static_cast<wkv7_cpu::Problem&>(b) = f;
  b.dy = rows(x.dy, s, 0), b.dfinal_state = with_state ? x.dfinal.floats() : nullptr;
  b.saved_state = f.saved_state, b.saved_sa = f.saved_sa;
  void** gradients[] = {&b.dr, &b.dw, &b.dk, &b.dv, &b.da, &b.db};
  for (int i = 0; i < INPUTS; ++i) *gradients[i] = made[GRADIENTS + i].data();
  b.dstate = with_state ? made[DSTATE].floats() : nullptr;
  for (int64_t unit = b.units(); unit-- > 0;) backward_unit(b, unit);
  for (int i = 0; i < OUTPUTS; ++i) {
    expect(made[i].guard_is_whole(), "written past the end of", kNames[i]);
    out[i] = made[i].values();
  }
  expect(saved_state.guard_is_whole() && saved_sa.guard_is_whole(), "written past the end of", "what forward keeps");
}

Inputs inputs_of(const Sizes& s, Dtype dtype, int64_t gap, Values (&in)[INPUTS], Values& state, Values& dy, Values& dfinal) {
  std::mt19937 random(static_cast<unsigned>(s.T * 1000 + s.N));
  auto number = [&] { return (random() >> 8) / 8388608.0 - 1; };  // in [-1, 1): alike on every machine
  Inputs x{{}, Memory(s.numel(), dtype), Memory(s.states(), Dtype::f32), Memory(s.states(), Dtype::f32), gap};
  for (int i = 0; i < INPUTS; ++i) x.in.emplace_back(s.numel() / s.N * (s.N + gap), dtype), in[i].resize(s.numel());
  for (int64_t row = 0; row < s.numel() / s.N; ++row) {
    double length = 0;
    Values key(s.N);
    for (double& k : key) k = number(), length += k * k;
    for (int64_t c = 0; c < s.N; ++c) {
      const double kk = key[c] / std::sqrt(length);
      const double of[INPUTS] = {1.7 * number(), 6 * number(), 1.7 * number(), 1.7 * number(), -kk, kk * (number() + 1) / 2};
      for (int i = 0; i < INPUTS; ++i) {
        const int64_t at = row * (s.N + gap) + c;
        x.in[i].set(at, of[i]);
        in[i][row * s.N + c] = x.in[i].get(at);
      }
    }
  }
  for (int64_t i = 0; i < s.numel(); ++i) x.dy.set(i, number());
  for (int64_t i = 0; i < s.states(); ++i) x.state.set(i, number()), x.dfinal.set(i, number());
  dy = x.dy.values(), state = x.state.values(), dfinal = x.dfinal.values();
  return x;
}

double worst[3][OUTPUTS];

void compare(const Sizes& s, Dtype dtype, bool with_state, int64_t gap, int64_t offset) {
  Values in[INPUTS], state, dy, dfinal, out[OUTPUTS], wanted[OUTPUTS];
  Inputs x = inputs_of(s, dtype, gap, in, state, dy, dfinal);
  if (!with_state) state.assign(s.states(), 0.0), dfinal.assign(s.states(), 0.0);
  run(s, dtype, x, with_state, offset, out);
  exact(s, in, state, dy, dfinal, wanted);
  for (int i = 0; i < OUTPUTS; ++i) {
    if (i == DSTATE && !with_state) continue;
    double off = 0, size = 0;
    for (size_t at = 0; at < wanted[i].size(); ++at)
      off += std::pow(out[i][at] - wanted[i][at], 2), size += std::pow(wanted[i][at], 2);
    const double error = size > 0 ? std::sqrt(off / size) : std::sqrt(off);
    const double most = dtype == Dtype::f32 || is_state(i) ? 2e-6 : dtype == Dtype::bf16 ? 2.5e-3 : 3e-4;
    double& so_far = worst[static_cast<int>(dtype)][i];
    if (!(error <= so_far)) so_far = error;
    if (!(error <= most)) {
      std::printf("%s is off by %.1e: T %d, N %d, dtype %d, documents %d, state %d\n", kNames[i], error, static_cast<int>(s.T),
                  static_cast<int>(s.N), static_cast<int>(dtype), static_cast<int>(s.documents()), with_state);
      ++failures;
    }
  }
}

// A NaN stays in its head and changes nothing before it.
void nan_stays_where_it_is(int64_t N, int which) {
  const Sizes s{1, 45, 2, N, {}};
  const int64_t bad = 21;
  Values in[INPUTS], state, dy, dfinal, clean[OUTPUTS], out[OUTPUTS];
  Inputs x = inputs_of(s, Dtype::f32, 0, in, state, dy, dfinal);
  run(s, Dtype::f32, x, true, 0, clean);
  x.in[which].set((bad * s.H + 0) * N + 3, std::nan(""));
  run(s, Dtype::f32, x, true, 0, out);
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t c = 0; c < N; ++c) {
      const int64_t first = t * s.H * N + c, second = first + N;  // of the two heads
      if (t < bad) expect(out[Y][first] == clean[Y][first], "y before a NaN changed; it was in", kInputNames[which]);
      for (int i = 0; i < OUTPUTS; ++i)
        if (!is_state(i)) expect(out[i][second] == clean[i][second], "another head than the NaN's changed:", kNames[i]);
    }
  bool found = false;
  for (int64_t c = 0; c < N; ++c)
    for (int64_t t : {bad, bad + 1}) found = found || std::isnan(out[Y][t * s.H * N + c]);
  expect(found, "a NaN is lost; it was in", kInputNames[which]);
}

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
    for (int64_t N : {16, 48, 64})
      for (int64_t T : {1, 33, 70})
        for (bool with_state : {false, true}) {
          compare({2, T, 2, N, {}}, dtype, with_state, 0, 0);
          const auto cut = static_cast<int32_t>(T);
          compare({1, T, 1, N, {0, 0, cut / 3, cut / 3, cut - 1, cut, cut}}, dtype, with_state, 8, 4);  // views; outputs off their lines
        }
  for (int which = 0; which < INPUTS; ++which) nan_stays_where_it_is(64, which), nan_stays_where_it_is(48, which);
  for (int dtype = 0; dtype < 3; ++dtype) {
    std::printf("%s", dtype == 0 ? "f32" : dtype == 1 ? "; bf16" : "; f16");
    for (int i = 0; i < OUTPUTS; ++i) std::printf(" %s %.1e", kNames[i], worst[dtype][i]);
  }
  std::printf("\n%d wrong\n", failures);
  return failures ? 1 : 0;
}
