// What a time mix does to each head of each token before and after its recurrence, each in one pass over memory. Gradients recompute what they need
// from the inputs. Sums over a head of N channels are taken by its N / 4 lanes.
//
// before (time_mix_inputs):   rate = sigmoid(a0 + a);   kk = k k_k / max(|k k_k|, 1e-12)
//                             key = k (1 + (rate - 1) k_a);   remove = -kk;   replace = kk rate
//                             value = v + (v_first - v) sigmoid(v0 + residual)      (nothing in layer 0)
// after (time_mix_output):    out = (group_norm(y) weight + bias + (sum over the head of r k r_k) v) g
//
// Per token and channel, in elements read + written: before 5 + 4 forward and 9 + 5 backward (layer 0: 2 + 3 and 5 + 2), after 5 + 1 and 6 + 5.
#include "row_tiles.cuh"

namespace {

constexpr float kSmallestNorm = 1e-12f;

// The sum over the lanes of a head, the same bits in each of them.
DEVICE float head_sum(float x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

struct Inputs {
  const void *k, *v, *a, *v_first, *residual;  // v_first and residual null: layer 0
  const void *k_k, *k_a, *a0, *v0;
  int rows, width, lanes;  // lanes of a head
};

template <class T>
struct InputVectors {
  float k_k[kVector], k_a[kVector], a0[kVector], v0[kVector];
  DEVICE InputVectors(const Inputs& p, const Tile& tile) {
    load_vector<T>(k_k, p.k_k, tile.channel, tile.active);
    load_vector<T>(k_a, p.k_a, tile.channel, tile.active);
    load_vector<T>(a0, p.a0, tile.channel, tile.active);
    load_vector<T>(v0, p.v0, tile.channel, tile.active && p.v_first);
  }
};

// 1 / max(|k k_k|, smallest)
DEVICE float inverse_norm(const float (&k)[kVector], const float (&k_k)[kVector], int lanes) {
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kVector; c++) squares += (k[c] * k_k[c]) * (k[c] * k_k[c]);
  const float norm = square_root(head_sum(squares, lanes));
  return 1.0f / (norm > kSmallestNorm ? norm : norm != norm ? norm : kSmallestNorm);
}

struct InputsForward {
  Inputs inputs;
  void *key, *value, *remove, *replace;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) inputs_forward(InputsForward all) {
  const Inputs& p = all.inputs;
  const Tile tile(p.rows, p.width);
  const InputVectors<T> vector(p, tile);
  for (int row = tile.row; row < tile.end; row++) {
    const int64_t at = int64_t(row) * p.width + tile.channel;
    float k[kVector], a[kVector], key[kVector], remove[kVector], replace[kVector];
    load_vector<T>(k, p.k, at, tile.active);
    load_vector<T>(a, p.a, at, tile.active);
    const float inverse = inverse_norm(k, vector.k_k, p.lanes);
    if (!tile.active) continue;
#pragma unroll
    for (int c = 0; c < kVector; c++) {
      const float rate = sigmoid<T>(vector.a0[c] + a[c]), kk = k[c] * vector.k_k[c] * inverse;
      key[c] = k[c] * (1.0f + (rate - 1.0f) * vector.k_a[c]);
      remove[c] = -kk;
      replace[c] = kk * rate;
    }
    store_vector<T>(all.key, at, key);
    store_vector<T>(all.remove, at, remove);
    store_vector<T>(all.replace, at, replace);
    if (!p.v_first) continue;
    float v[kVector], first[kVector], residual[kVector];
    load_vector<T>(v, p.v, at);
    load_vector<T>(first, p.v_first, at);
    load_vector<T>(residual, p.residual, at);
#pragma unroll
    for (int c = 0; c < kVector; c++) v[c] += (first[c] - v[c]) * sigmoid<T>(vector.v0[c] + residual[c]);
    store_vector<T>(all.value, at, v);
  }
}

struct InputsBackward {
  Inputs inputs;
  const void *dkey, *dvalue, *dremove, *dreplace;
  void *dk, *dv, *da, *dv_first, *dresidual;
  float* partial;  // [tiles, 4, width]: of k_k, k_a, a0, v0
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) inputs_backward(InputsBackward all) {
  SHARED_MEMORY(shared);
  const Inputs& p = all.inputs;
  const Tile tile(p.rows, p.width);
  const InputVectors<T> vector(p, tile);
  float sums[4][kVector];
#pragma unroll
  for (int i = 0; i < 4; i++) clear(sums[i]);
  for (int row = tile.row; row < tile.end; row++) {
    const int64_t at = int64_t(row) * p.width + tile.channel;
    float k[kVector], a[kVector], dkey[kVector], dremove[kVector], dreplace[kVector], rate[kVector];
    load_vector<T>(k, p.k, at, tile.active);
    load_vector<T>(a, p.a, at, tile.active);
    load_vector<T>(dkey, all.dkey, at, tile.active);
    load_vector<T>(dremove, all.dremove, at, tile.active);
    load_vector<T>(dreplace, all.dreplace, at, tile.active);
    const float inverse = inverse_norm(k, vector.k_k, p.lanes);
    float along = 0.0f;  // sum of kk dkk
#pragma unroll
    for (int c = 0; c < kVector; c++) {
      rate[c] = sigmoid<T>(vector.a0[c] + a[c]);
      along += k[c] * vector.k_k[c] * inverse * (dreplace[c] * rate[c] - dremove[c]);
    }
    along = head_sum(along, p.lanes);
    // where the norm is cut to its smallest value it has no gradient
    const float share = inverse < 1.0f / kSmallestNorm ? along : 0.0f;
    if (!tile.active) continue;
    float dk[kVector], da[kVector];
#pragma unroll
    for (int c = 0; c < kVector; c++) {
      const float kk = k[c] * vector.k_k[c] * inverse;
      const float dunit = (dreplace[c] * rate[c] - dremove[c] - kk * share) * inverse;
      da[c] = (dreplace[c] * kk + dkey[c] * k[c] * vector.k_a[c]) * rate[c] * (1.0f - rate[c]);
      dk[c] = dkey[c] * (1.0f + (rate[c] - 1.0f) * vector.k_a[c]) + dunit * vector.k_k[c];
      sums[0][c] += dunit * k[c];
      sums[1][c] += dkey[c] * k[c] * (rate[c] - 1.0f);
      sums[2][c] += da[c];
    }
    store_vector<T>(all.dk, at, dk);
    store_vector<T>(all.da, at, da);
    if (!p.v_first) continue;
    float v[kVector], first[kVector], residual[kVector], dvalue[kVector];
    load_vector<T>(v, p.v, at);
    load_vector<T>(first, p.v_first, at);
    load_vector<T>(residual, p.residual, at);
    load_vector<T>(dvalue, all.dvalue, at);
#pragma unroll
    for (int c = 0; c < kVector; c++) {
      const float of_first = sigmoid<T>(vector.v0[c] + residual[c]);
      const float dfirst = dvalue[c] * of_first;
      residual[c] = dfirst * (1.0f - of_first) * (first[c] - v[c]);
      dvalue[c] -= dfirst;
      first[c] = dfirst;
      sums[3][c] += residual[c];
    }
    store_vector<T>(all.dv, at, dvalue);
    store_vector<T>(all.dv_first, at, first);
    store_vector<T>(all.dresidual, at, residual);
  }
  close_tile<4>(tile, p.width, sums, shared, all.partial);
}

struct Outputs {
  const void *y, *r, *k, *v, *g;
  const void *r_k, *weight, *bias;
  float eps;
  int rows, width, lanes;
};

template <class T>
struct OutputVectors {
  float r_k[kVector], weight[kVector], bias[kVector];
  DEVICE OutputVectors(const Outputs& p, const Tile& tile) {
    load_vector<T>(r_k, p.r_k, tile.channel, tile.active);
    load_vector<T>(weight, p.weight, tile.channel, tile.active);
    load_vector<T>(bias, p.bias, tile.channel, tile.active);
  }
};

// One row's inputs, and what is summed over a head of it.
template <class T>
struct OutputRow {
  float r[kVector], k[kVector], v[kVector], g[kVector];
  float normal[kVector];  // y without its mean, over its standard deviation
  float scale, bonus;     // 1 / standard deviation;  sum of r k r_k

  DEVICE OutputRow(const Outputs& p, const OutputVectors<T>& vector, int64_t at, bool active) {
    load_vector<T>(normal, p.y, at, active);
    load_vector<T>(r, p.r, at, active);
    load_vector<T>(k, p.k, at, active);
    load_vector<T>(v, p.v, at, active);
    load_vector<T>(g, p.g, at, active);
    const float each = 1.0f / float(kVector * p.lanes);
    float sum = 0.0f, squares = 0.0f;
    bonus = 0.0f;
#pragma unroll
    for (int c = 0; c < kVector; c++) sum += normal[c], bonus += r[c] * k[c] * vector.r_k[c];
    const float mean = head_sum(sum, p.lanes) * each;
    bonus = head_sum(bonus, p.lanes);
#pragma unroll
    for (int c = 0; c < kVector; c++) normal[c] -= mean, squares += normal[c] * normal[c];
    scale = 1.0f / square_root(head_sum(squares, p.lanes) * each + p.eps);
#pragma unroll
    for (int c = 0; c < kVector; c++) normal[c] *= scale;
  }
};

struct OutputsForward {
  Outputs outputs;
  void* out;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) output_forward(OutputsForward all) {
  const Outputs& p = all.outputs;
  const Tile tile(p.rows, p.width);
  const OutputVectors<T> vector(p, tile);
  for (int row = tile.row; row < tile.end; row++) {
    const int64_t at = int64_t(row) * p.width + tile.channel;
    const OutputRow<T> x(p, vector, at, tile.active);
    if (!tile.active) continue;
    float out[kVector];
#pragma unroll
    for (int c = 0; c < kVector; c++) out[c] = (x.normal[c] * vector.weight[c] + vector.bias[c] + x.bonus * x.v[c]) * x.g[c];
    store_vector<T>(all.out, at, out);
  }
}

struct OutputsBackward {
  Outputs outputs;
  const void* dout;
  void *dy, *dr, *dk, *dv, *dg;
  float* partial;  // [tiles, 3, width]: of r_k, weight, bias
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) output_backward(OutputsBackward all) {
  SHARED_MEMORY(shared);
  const Outputs& p = all.outputs;
  const Tile tile(p.rows, p.width);
  const OutputVectors<T> vector(p, tile);
  const float each = 1.0f / float(kVector * p.lanes);
  float sums[3][kVector];
#pragma unroll
  for (int i = 0; i < 3; i++) clear(sums[i]);
  for (int row = tile.row; row < tile.end; row++) {
    const int64_t at = int64_t(row) * p.width + tile.channel;
    float d[kVector];
    load_vector<T>(d, all.dout, at, tile.active);
    const OutputRow<T> x(p, vector, at, tile.active);
    float dbonus = 0.0f, mean = 0.0f, slope = 0.0f;  // sums over the head of dz v, dnormal, dnormal normal
#pragma unroll
    for (int c = 0; c < kVector; c++) {
      const float dz = d[c] * x.g[c], dnormal = dz * vector.weight[c];
      dbonus += dz * x.v[c];
      mean += dnormal;
      slope += dnormal * x.normal[c];
    }
    dbonus = head_sum(dbonus, p.lanes);
    mean = head_sum(mean, p.lanes) * each;
    slope = head_sum(slope, p.lanes) * each;
    if (!tile.active) continue;
    float dy[kVector], dr[kVector], dk[kVector], dv[kVector], dg[kVector];
#pragma unroll
    for (int c = 0; c < kVector; c++) {
      const float dz = d[c] * x.g[c];
      dg[c] = d[c] * (x.normal[c] * vector.weight[c] + vector.bias[c] + x.bonus * x.v[c]);
      dy[c] = (dz * vector.weight[c] - mean - x.normal[c] * slope) * x.scale;
      dr[c] = dbonus * x.k[c] * vector.r_k[c];
      dk[c] = dbonus * x.r[c] * vector.r_k[c];
      dv[c] = dz * x.bonus;
      sums[0][c] += dbonus * x.r[c] * x.k[c];
      sums[1][c] += dz * x.normal[c];
      sums[2][c] += dz;
    }
    store_vector<T>(all.dy, at, dy);
    store_vector<T>(all.dr, at, dr);
    store_vector<T>(all.dk, at, dk);
    store_vector<T>(all.dv, at, dv);
    store_vector<T>(all.dg, at, dg);
  }
  close_tile<3>(tile, p.width, sums, shared, all.partial);
}

// Lanes of a head; 0 where there is no kernel for it.
int lanes_of(int head_size) {
  const int lanes = head_size / kVector;
  const bool power_of_two = lanes > 0 && (lanes & (lanes - 1)) == 0;
  return head_size % kVector == 0 && power_of_two && lanes <= kWarpSize ? lanes : 0;
}

}  // namespace

extern "C" {

// Return 0, a CUDA error number, or -1 for another dtype or head size (4, 8, ... 128: powers of two). All pointers are to the current device and
// multiples of 16; activations [rows, width], vectors [width], width a multiple of the head size. v_first, residual, v0, value and their gradients are
// null in layer 0.

// fp32 numbers of the buffers that the backward kernels need.
int64_t time_mix_partial_numbers(int64_t rows, int width) { return partial_numbers(rows, width, 4); }

int time_mix_inputs_forward(int dtype, int64_t rows, int width, int head_size, const void* k, const void* v, const void* a, const void* v_first,
                            const void* residual, const void* k_k, const void* k_a, const void* a0, const void* v0, void* key, void* value,
                            void* remove, void* replace, int64_t stream) {
  const int lanes = lanes_of(head_size);
  if (!lanes) return kNoSuchKernel;
  const InputsForward p{{k, v, a, v_first, residual, k_k, k_a, a0, v0, int(rows), width, lanes}, key, value, remove, replace};
  return by_dtype(dtype, [&](auto number) { return launch(inputs_forward<decltype(number)>, tile_blocks(rows, width), kTileThreads, 0, stream, p); });
}

int time_mix_inputs_backward(int dtype, int64_t rows, int width, int head_size, const void* dkey, const void* dvalue, const void* dremove,
                             const void* dreplace, const void* k, const void* v, const void* a, const void* v_first, const void* residual,
                             const void* k_k, const void* k_a, const void* a0, const void* v0, void* dk, void* dv, void* da, void* dv_first,
                             void* dresidual, void* dk_k, void* dk_a, void* da0, void* dv0, float* partial, int64_t stream) {
  const int lanes = lanes_of(head_size);
  if (!lanes) return kNoSuchKernel;
  const Inputs inputs{k, v, a, v_first, residual, k_k, k_a, a0, v0, int(rows), width, lanes};
  const InputsBackward p{inputs, dkey, dvalue, dremove, dreplace, dk, dv, da, dv_first, dresidual, partial};
  return by_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    if (const int code = launch(inputs_backward<T>, tile_blocks(rows, width), kTileThreads, tile_sum_bytes(4), stream, p)) return code;
    return launch_add_tiles<T>(partial, {{dk_k, dk_a, da0, dv0}}, 4, rows, width, stream);
  });
}

int time_mix_output_forward(int dtype, int64_t rows, int width, int head_size, float eps, const void* y, const void* r, const void* k,
                            const void* v, const void* g, const void* r_k, const void* weight, const void* bias, void* out, int64_t stream) {
  const int lanes = lanes_of(head_size);
  if (!lanes) return kNoSuchKernel;
  const OutputsForward p{{y, r, k, v, g, r_k, weight, bias, eps, int(rows), width, lanes}, out};
  return by_dtype(dtype, [&](auto number) { return launch(output_forward<decltype(number)>, tile_blocks(rows, width), kTileThreads, 0, stream, p); });
}

int time_mix_output_backward(int dtype, int64_t rows, int width, int head_size, float eps, const void* dout, const void* y, const void* r,
                             const void* k, const void* v, const void* g, const void* r_k, const void* weight, const void* bias, void* dy,
                             void* dr, void* dk, void* dv, void* dg, void* dr_k, void* dweight, void* dbias, float* partial, int64_t stream) {
  const int lanes = lanes_of(head_size);
  if (!lanes) return kNoSuchKernel;
  const OutputsBackward p{{y, r, k, v, g, r_k, weight, bias, eps, int(rows), width, lanes}, dout, dy, dr, dk, dv, dg, partial};
  return by_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    if (const int code = launch(output_backward<T>, tile_blocks(rows, width), kTileThreads, tile_sum_bytes(3), stream, p)) return code;
    return launch_add_tiles<T>(partial, {{dr_k, dweight, dbias}}, 3, rows, width, stream);
  });
}
}
