// WKV7, exact: the recurrence as it is written, in fp32, for bf16, fp16 and fp32 inputs and head sizes 32, 64 and 128.
//
//   decay_t = exp(-exp(-0.5) sigmoid(w_t))                     per key channel j
//   sa_t    = S_{t-1} a_t                                      per value channel i
//   S_t     = S_{t-1} diag(decay_t) + sa_t b_t^T + v_t k_t^T   N x N, value index i, key index j
//   y_t     = S_t r_t
//
// Backward, with D_t = dLoss/dS_t:  D_t = E_t + dy_t r_t^T,  E_{t-1} = D_t diag(decay_t) + dsa_t a_t^T,  dsa_t = D_t b_t
//   dv = D k   dk = D^T v   db = D^T sa   dr = S_t^T dy   da = S_{t-1}^T dsa   dlog(decay_t) = colsum(D_t * S_{t-1}) decay_t
//
// One block owns one head of one document. A thread owns 4 rows of S and every fourth group of 4 columns; the lanes of a row stand
// side by side in a warp, so S a and S r need a few shuffles and no barrier: the blocks synchronise once per window of tokens.
//
// D runs backward in time and S forward, and S must not be had by dividing by the decay (0.545^-16 would amplify
// rounding 16000 times). So forward keeps S at the start of every window, and backward makes two passes over a window: D from its end to its
// start, which gives dsa, dv, dk, db; then S from its start to its end, which gives dr and da. dlog(decay) would need both at
// once; instead it follows from z_t = colsum(E_t * S_t), known exactly at the window's start, by telescoping:
//   dlog(decay_t) = z_{t-1} - a da;   z_t = dlog(decay_t) + b db + k dk - r dr.
#include "wkv7_document.cuh"

namespace {

template <int N>
struct Shape {
  static constexpr int rows = 4;                                  // of S per thread
  static constexpr int columns = N < 64 ? N / 4 : 16;             // of S per thread
  static constexpr int lanes = N / columns;                       // threads that share a row
  static constexpr int threads = (N / rows) * lanes;
  static constexpr int warps = threads / kWarpSize;
  static constexpr int window = N <= 64 ? 16 : 8;                 // tokens between two saved states
  static constexpr int flush = window / 4;                        // tokens between two sums over the warps
};

struct Forward {
  const void *r, *w, *k, *v, *a, *b;  // [tokens, H, N]
  const float* state;                 // [documents, H, N, N] or null: zeros
  const int32_t* cu_seqlens;          // [documents + 1] or null: documents of T tokens
  void* y;
  float* final_state;
  float* saved_state;                 // [windows, H, N, N] or null: a state at each window's start
  float* saved_sa;                    // [tokens, H, N] or null
  int64_t tokens_each;                // T, where cu_seqlens is null
  int heads;
};

struct Backward {
  const void *dy, *r, *w, *k, *v, *a, *b;
  const float *dfinal_state, *saved_state, *saved_sa;
  const int32_t* cu_seqlens;
  void *dr, *dw, *dk, *dv, *da, *db;
  float* dstate;  // [documents, H, N, N] or null
  int64_t tokens_each;
  int heads;
};

using Document = DocumentOf<int64_t>;

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exact_exp(-x)); }
DEVICE float decay_of(float w) { return exact_exp(kDecayScale * sigmoid(w)); }

// Where a thread's part of S lies: rows row .. row+3, and local column l is key channel column(l).
template <int N>
struct TilePosition {
  using Is = Shape<N>;
  int thread, lane, warp, part, row;
  DEVICE TilePosition() {
    thread = int(threadIdx.x);
    lane = thread % kWarpSize;
    warp = thread / kWarpSize;
    part = thread % Is::lanes;
    row = thread / Is::lanes * Is::rows;
  }
  // Lanes of a row read neighbouring groups of 4 floats: one shared-memory transaction.
  DEVICE int column(int local) const { return 4 * (part + Is::lanes * (local / 4)) + local % 4; }
};

// Tokens [from, from + count) of x[tokens, heads, N] to shared memory as fp32, each through `map`.
template <int N, class T, class Map>
DEVICE void load_window(float* to, const void* from, int64_t first, int count, const Document& at, int heads, Map map) {
  constexpr int per_load = 16 / int(sizeof(T)), loads = N / per_load;
  for (int i = int(threadIdx.x); i < count * loads; i += Shape<N>::threads) {
    const int token = i / loads, channel = i % loads * per_load;
    const T* source = static_cast<const T*>(from) + ((first + token) * heads + at.head) * N + channel;
    float values[per_load];
    load_floats(values, source);
#pragma unroll
    for (int e = 0; e < per_load; e++) to[token * N + channel + e] = map(values[e]);
  }
}

template <int N>
DEVICE void load_columns(float (&to)[Shape<N>::columns], const float* from, const TilePosition<N>& place) {
#pragma unroll
  for (int l = 0; l < Shape<N>::columns; l += 4) {
    float four[4];
    load_floats(four, from + place.column(l));
#pragma unroll
    for (int e = 0; e < 4; e++) to[l + e] = four[e];
  }
}

template <int N>
using Tile = float[Shape<N>::rows][Shape<N>::columns];

template <int N>
DEVICE void load_tile(Tile<N>& tile, const float* matrix, const TilePosition<N>& place) {
#pragma unroll
  for (int i = 0; i < Shape<N>::rows; i++) {
    if (matrix) {
      load_columns<N>(tile[i], matrix + (place.row + i) * N, place);
    } else {
#pragma unroll
      for (int l = 0; l < Shape<N>::columns; l++) tile[i][l] = 0.0f;
    }
  }
}

template <int N>
DEVICE void store_tile(float* matrix, const Tile<N>& tile, const TilePosition<N>& place) {
#pragma unroll
  for (int i = 0; i < Shape<N>::rows; i++)
#pragma unroll
    for (int l = 0; l < Shape<N>::columns; l += 4)
      store_floats(matrix + (place.row + i) * N + place.column(l), tile[i][l], tile[i][l + 1], tile[i][l + 2], tile[i][l + 3]);
}

// This thread's share of tile x, to be summed over the lanes of a row.
template <int N>
DEVICE void row_shares(float (&sums)[4], const Tile<N>& tile, const float (&x)[Shape<N>::columns]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float even = 0.0f, odd = 0.0f;  // two chains: a dependent fma waits 4 cycles
#pragma unroll
    for (int l = 0; l < Shape<N>::columns; l += 2) {
      even += tile[i][l] * x[l];
      odd += tile[i][l + 1] * x[l + 1];
    }
    sums[i] = even + odd;
  }
}

// Sums over the lanes of a row; every lane gets all four.
template <int N>
DEVICE void sum_rows(float (&sums)[4]) {
#pragma unroll
  for (int mask = 1; mask < Shape<N>::lanes; mask *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += shuffle_xor(sums[i], mask);
}

// Sums over the lanes of a row; the lane of part p gets the sum of row p % 4. Half the shuffles of sum_rows.
template <int N>
DEVICE float sum_rows_transposed(const float (&sums)[4], int part) {
  const bool high = part & 2, odd = part & 1;
  const float first = (high ? sums[2] : sums[0]) + shuffle_xor(high ? sums[0] : sums[2], 2);
  const float second = (high ? sums[3] : sums[1]) + shuffle_xor(high ? sums[1] : sums[3], 2);
  float sum = (odd ? second : first) + shuffle_xor(odd ? first : second, 1);
#pragma unroll
  for (int mask = 4; mask < Shape<N>::lanes; mask *= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// Sums of each column over a warp's rows, written to to[N]. At each step a lane gives away half of the `held` columns that it still
// has, of which `first` is the first. A recursion, so that every index into `sums` is a constant and it stays in registers.
template <int N, int mask = kWarpSize / 2, int held = Shape<N>::columns>
DEVICE void sum_columns(float* to, float (&sums)[Shape<N>::columns], const TilePosition<N>& place, int first = 0) {
  if constexpr (mask >= Shape<N>::lanes) {
    constexpr int half = held / 2;
    const bool upper = place.lane & mask;
#pragma unroll
    for (int l = 0; l < half; l++) {
      const float give = upper ? sums[l] : sums[l + half];
      sums[l] = (upper ? sums[l + half] : sums[l]) + shuffle_xor(give, mask);
    }
    sum_columns<N, mask / 2, half>(to, sums, place, first + (upper ? half : 0));
  } else {
#pragma unroll
    for (int l = 0; l < held; l++) to[place.column(first + l)] = sums[l];
  }
}

// Column shares of tile^T x, for the four rows of a thread.
template <int N>
DEVICE void column_shares(float (&sums)[Shape<N>::columns], const Tile<N>& tile, const float (&x)[4]) {
#pragma unroll
  for (int l = 0; l < Shape<N>::columns; l++) {
    sums[l] = tile[0][l] * x[0];
#pragma unroll
    for (int i = 1; i < 4; i++) sums[l] += tile[i][l] * x[i];
  }
}

// tile += x y^T
template <int N>
DEVICE void add_outer(Tile<N>& tile, const float (&x)[4], const float (&y)[Shape<N>::columns]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int l = 0; l < Shape<N>::columns; l++) tile[i][l] += x[i] * y[l];
}

template <int N>
DEVICE void scale_columns(Tile<N>& tile, const float (&x)[Shape<N>::columns]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int l = 0; l < Shape<N>::columns; l++) tile[i][l] *= x[l];
}

// --- Forward --------------------------------------------------------------------------------------------------------------

template <int N>
constexpr size_t forward_shared_bytes() {
  return sizeof(float) * 6 * Shape<N>::window * N;
}

template <int N, class T>
__global__ void __launch_bounds__(Shape<N>::threads, 1) wkv7_recurrent_forward(Forward p) {
  using Is = Shape<N>;
  SHARED_MEMORY(shared);
  float* const decays = reinterpret_cast<float*>(shared);  // each [window, N]
  float *const ks = decays + Is::window * N, *const vs = ks + Is::window * N, *const as = vs + Is::window * N,
               *const bs = as + Is::window * N, *const rs = bs + Is::window * N;
  const Document at(p.cu_seqlens, p.tokens_each, p.heads, Is::window);
  const TilePosition<N> place;
  const int64_t matrix = at.matrix(p.heads, N);
  const auto same = [](float x) { return x; };

  Tile<N> state;
  load_tile<N>(state, p.state ? p.state + matrix : nullptr, place);
  for (int64_t first = at.begin, slot = at.first_slot; first < at.end; first += Is::window, slot++) {
    const int count = int(at.end - first < Is::window ? at.end - first : Is::window);
    if (p.saved_state) store_tile<N>(p.saved_state + (slot * p.heads + at.head) * N * N, state, place);
    sync_block();  // all threads have read the previous window
    load_window<N, T>(decays, p.w, first, count, at, p.heads, [](float w) { return decay_of(w); });
    load_window<N, T>(ks, p.k, first, count, at, p.heads, same);
    load_window<N, T>(vs, p.v, first, count, at, p.heads, same);
    load_window<N, T>(as, p.a, first, count, at, p.heads, same);
    load_window<N, T>(bs, p.b, first, count, at, p.heads, same);
    load_window<N, T>(rs, p.r, first, count, at, p.heads, same);
    sync_block();

    float sa[4];
    {
      float a[Is::columns];
      load_columns<N>(a, as, place);
      row_shares<N>(sa, state, a);
      sum_rows<N>(sa);
    }
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      const int64_t out = ((first + t) * p.heads + at.head) * N + place.row;
      if (p.saved_sa && place.part == 0)
        store_floats(p.saved_sa + out, sa[0], sa[1], sa[2], sa[3]);
      float x[Is::columns], v[4];
      load_columns<N>(x, decays + t * N, place);
      scale_columns<N>(state, x);
      load_columns<N>(x, bs + t * N, place);
      add_outer<N>(state, sa, x);
      load_columns<N>(x, ks + t * N, place);
      load_floats(v, vs + t * N + place.row);
      add_outer<N>(state, v, x);
      // y of this token and sa of the next need the same state: their sums wait for their shuffles together.
      float y[4];
      load_columns<N>(x, rs + t * N, place);
      row_shares<N>(y, state, x);
      load_columns<N>(x, as + (t + 1 < count ? t + 1 : t) * N, place);
      row_shares<N>(sa, state, x);
      const float sum = sum_rows_transposed<N>(y, place.part);
      sum_rows<N>(sa);
      if (place.part < 4) static_cast<T*>(p.y)[out + place.part] = from_float<T>(sum);
    }
  }
  store_tile<N>(p.final_state + matrix, state, place);
}

// --- Backward -------------------------------------------------------------------------------------------------------------

template <int N>
constexpr size_t backward_shared_bytes() {
  using Is = Shape<N>;
  return sizeof(float) * (11 * Is::window + 2 * Is::flush * Is::warps) * N;
}

template <int N, class T>
__global__ void __launch_bounds__(Shape<N>::threads, 1) wkv7_recurrent_backward(Backward p) {
  using Is = Shape<N>;
  SHARED_MEMORY(shared);
  float* const decays = reinterpret_cast<float*>(shared);  // each [window, N]
  float *const ks = decays + Is::window * N, *const vs = ks + Is::window * N, *const as = vs + Is::window * N,
               *const bs = as + Is::window * N, *const rs = bs + Is::window * N, *const dys = rs + Is::window * N,
               *const sas = dys + Is::window * N, *const dsas = sas + Is::window * N, *const dks = dsas + Is::window * N,
               *const dbs = dks + Is::window * N;
  float* const shares = dbs + Is::window * N;  // [2, flush, warps, N]: column sums of each warp
  const auto share = [&](int which, int token) { return shares + ((which * Is::flush + token) * Is::warps) * N; };
  const Document at(p.cu_seqlens, p.tokens_each, p.heads, Is::window);
  const TilePosition<N> place;
  const int64_t matrix = at.matrix(p.heads, N);
  const int channel = place.thread;  // of the key channel that this thread sums and writes; threads >= N have none
  const auto same = [](float x) { return x; };
  const auto over_warps = [&](int which, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Is::warps; warp++) sum += share(which, token)[warp * N + channel];
    return sum;
  };

  Tile<N> d;
  load_tile<N>(d, p.dfinal_state ? p.dfinal_state + matrix : nullptr, place);
  const int64_t windows = (at.end - at.begin + Is::window - 1) / Is::window;
  for (int64_t number = windows - 1; number >= 0; number--) {
    const int64_t first = at.begin + number * Is::window;
    const int count = int(at.end - first < Is::window ? at.end - first : Is::window);
    sync_block();
    load_window<N, T>(decays, p.w, first, count, at, p.heads, [](float w) { return decay_of(w); });
    load_window<N, T>(ks, p.k, first, count, at, p.heads, same);
    load_window<N, T>(vs, p.v, first, count, at, p.heads, same);
    load_window<N, T>(as, p.a, first, count, at, p.heads, same);
    load_window<N, T>(bs, p.b, first, count, at, p.heads, same);
    load_window<N, T>(rs, p.r, first, count, at, p.heads, same);
    load_window<N, T>(dys, p.dy, first, count, at, p.heads, same);
    load_window<N, float>(sas, p.saved_sa, first, count, at, p.heads, same);
    sync_block();

    // D from the window's end to its start.
#pragma unroll 1
    for (int block_end = count; block_end > 0; block_end -= Is::flush) {
      const int block_begin = block_end > Is::flush ? block_end - Is::flush : 0;
#pragma unroll 1
      for (int t = block_end - 1; t >= block_begin; t--) {
        float x[Is::columns], dy[4], v[4], sa[4], dsa[4], dv[4], sums[Is::columns];
        load_columns<N>(x, rs + t * N, place);
        load_floats(dy, dys + t * N + place.row);
        add_outer<N>(d, dy, x);
        load_columns<N>(x, bs + t * N, place);
        row_shares<N>(dsa, d, x);
        load_columns<N>(x, ks + t * N, place);
        row_shares<N>(dv, d, x);
        sum_rows<N>(dsa);
        const float sum = sum_rows_transposed<N>(dv, place.part);
        if (place.part < 4)
          static_cast<T*>(p.dv)[((first + t) * p.heads + at.head) * N + place.row + place.part] = from_float<T>(sum);
        if (place.part == 0)
          store_floats(dsas + t * N + place.row, dsa[0], dsa[1], dsa[2], dsa[3]);
        load_floats(v, vs + t * N + place.row);
        column_shares<N>(sums, d, v);
        sum_columns<N>(share(0, t - block_begin) + place.warp * N, sums, place);
        load_floats(sa, sas + t * N + place.row);
        column_shares<N>(sums, d, sa);
        sum_columns<N>(share(1, t - block_begin) + place.warp * N, sums, place);
        load_columns<N>(x, decays + t * N, place);
        scale_columns<N>(d, x);
        load_columns<N>(x, as + t * N, place);
        add_outer<N>(d, dsa, x);
      }
      sync_block();
      if (channel < N)
        for (int t = block_begin; t < block_end; t++) {
          dks[t * N + channel] = over_warps(0, t - block_begin);
          dbs[t * N + channel] = over_warps(1, t - block_begin);
        }
      sync_block();
    }

    // S from its start to its end. d is E at the window's start now.
    Tile<N> state;
    load_tile<N>(state, p.saved_state + ((at.first_slot + number) * p.heads + at.head) * N * N, place);
    float z = 0.0f;
    {
      float sums[Is::columns];
#pragma unroll
      for (int l = 0; l < Is::columns; l++) {
        sums[l] = d[0][l] * state[0][l];
#pragma unroll
        for (int i = 1; i < 4; i++) sums[l] += d[i][l] * state[i][l];
      }
      sum_columns<N>(share(0, 0) + place.warp * N, sums, place);
      sync_block();
      if (channel < N) z = over_warps(0, 0);
      sync_block();
    }
#pragma unroll 1
    for (int block_begin = 0; block_begin < count; block_begin += Is::flush) {
      const int block_end = block_begin + Is::flush < count ? block_begin + Is::flush : count;
#pragma unroll 1
      for (int t = block_begin; t < block_end; t++) {
        float x[Is::columns], rows[4], sums[Is::columns];
        load_floats(rows, dsas + t * N + place.row);
        column_shares<N>(sums, state, rows);
        sum_columns<N>(share(1, t - block_begin) + place.warp * N, sums, place);
        load_columns<N>(x, decays + t * N, place);
        scale_columns<N>(state, x);
        load_columns<N>(x, bs + t * N, place);
        load_floats(rows, sas + t * N + place.row);
        add_outer<N>(state, rows, x);
        load_columns<N>(x, ks + t * N, place);
        load_floats(rows, vs + t * N + place.row);
        add_outer<N>(state, rows, x);
        load_floats(rows, dys + t * N + place.row);
        column_shares<N>(sums, state, rows);
        sum_columns<N>(share(0, t - block_begin) + place.warp * N, sums, place);
      }
      sync_block();
      if (channel < N)
        for (int t = block_begin; t < block_end; t++) {
          const int64_t out = ((first + t) * p.heads + at.head) * N + channel;
          const int here = t * N + channel;
          const float dr = over_warps(0, t - block_begin), da = over_warps(1, t - block_begin);
          const float dlog_decay = z - as[here] * da;
          z = dlog_decay + bs[here] * dbs[here] + ks[here] * dks[here] - rs[here] * dr;
          const float w = to_float(static_cast<const T*>(p.w)[out]);
          static_cast<T*>(p.dr)[out] = from_float<T>(dr);
          static_cast<T*>(p.da)[out] = from_float<T>(da);
          static_cast<T*>(p.dk)[out] = from_float<T>(dks[here]);
          static_cast<T*>(p.db)[out] = from_float<T>(dbs[here]);
          static_cast<T*>(p.dw)[out] = from_float<T>(dlog_decay * kDecayScale * sigmoid(w) * sigmoid(-w));
        }
      sync_block();
    }
  }
  if (p.dstate) store_tile<N>(p.dstate + matrix, d, place);
}

// --- Entry points ---------------------------------------------------------------------------------------------------------

template <int N, class T>
int forward(const Forward& p, int documents, int64_t stream) {
  return launch(wkv7_recurrent_forward<N, T>, unsigned(documents * p.heads), Shape<N>::threads, forward_shared_bytes<N>(), stream, p);
}
template <int N, class T>
int backward(const Backward& p, int documents, int64_t stream) {
  return launch(wkv7_recurrent_backward<N, T>, unsigned(documents * p.heads), Shape<N>::threads, backward_shared_bytes<N>(), stream, p);
}

// The kernel for a head size and a dtype (0: fp32, 1: bf16, 2: fp16).
#define CHOOSE(direction)                                                \
  switch (head_size * 4 + dtype) {                                       \
    case 32 * 4 + 0: return direction<32, float>(p, documents, stream);  \
    case 32 * 4 + 1: return direction<32, bf16>(p, documents, stream);   \
    case 32 * 4 + 2: return direction<32, fp16>(p, documents, stream);   \
    case 64 * 4 + 0: return direction<64, float>(p, documents, stream);  \
    case 64 * 4 + 1: return direction<64, bf16>(p, documents, stream);   \
    case 64 * 4 + 2: return direction<64, fp16>(p, documents, stream);   \
    case 128 * 4 + 0: return direction<128, float>(p, documents, stream); \
    case 128 * 4 + 1: return direction<128, bf16>(p, documents, stream);  \
    case 128 * 4 + 2: return direction<128, fp16>(p, documents, stream);  \
    default: return kNoSuchKernel;                                       \
  }

}  // namespace

extern "C" {

// Bytes that forward keeps for backward, for `tokens` tokens in all: states fp32 [tokens / window + documents, H, N, N] and sa fp32 [tokens, H, N].
int64_t wkv7_recurrent_saved_state_bytes(int head_size, int64_t documents, int64_t tokens, int64_t heads) {
  const int window = head_size <= 64 ? Shape<64>::window : Shape<128>::window;
  return (tokens / window + documents) * heads * head_size * head_size * int64_t(sizeof(float));
}
int64_t wkv7_recurrent_saved_sa_bytes(int head_size, int64_t, int64_t tokens, int64_t heads) {
  return tokens * heads * head_size * int64_t(sizeof(float));
}

// Both return 0, a CUDA error number, or -1 where no kernel exists for this head size and dtype. All pointers are to the current device, 16-byte
// aligned, dense. Null: state (zeros), cu_seqlens (documents of tokens_each tokens), saved_state and saved_sa together (nothing is
// kept), dfinal_state (zeros), dstate (not wanted).
int wkv7_recurrent_forward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* r, const void* w, const void* k,
                           const void* v, const void* a, const void* b, const float* state, const int32_t* cu_seqlens, void* y,
                           float* final_state, void* saved_state, void* saved_sa, int64_t stream) {
  const Forward p{r, w, k, v, a, b, state, cu_seqlens, y, final_state, static_cast<float*>(saved_state), static_cast<float*>(saved_sa), tokens_each, heads};
  CHOOSE(forward)
}

int wkv7_recurrent_backward(int dtype, int head_size, int documents, int64_t tokens_each, int heads, const void* dy, const float* dfinal_state,
                            const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
                            const int32_t* cu_seqlens, const void* saved_state, const void* saved_sa, void* dr, void* dw, void* dk,
                            void* dv, void* da, void* db, float* dstate, int64_t stream) {
  const Backward p{dy, r, w, k, v, a, b, dfinal_state, static_cast<const float*>(saved_state), static_cast<const float*>(saved_sa), cu_seqlens,
                   dr, dw, dk, dv, da, db, dstate, tokens_each, heads};
  CHOOSE(backward)
}
}
