// Token shift with its learned mixes, all mixes in one pass over memory:
//
//   mixed_i[t] = x[t] + (x[t-1] - x[t]) mix_i,   x[-1] = last (or 0), for each document anew
//
// backward:  dx[t] = sum_i dmixed_i[t] (1 - mix_i) + sum_i dmixed_i[t+1] mix_i,   dlast = sum_i dmixed_i[first] mix_i,
//            dmix_i = sum over t of dmixed_i[t] (x[t-1] - x[t])
//
// Per token and channel, in elements: forward 1 read, n written; backward n + 1 read, 1 written, where n is the number of mixes. A warp reads one row
// of its neighbour besides its own eight, which another warp of the GPU has just brought into the cache.
#include "row_tiles.cuh"

namespace {

// The document that a row belongs to. Values of cu_seqlens are not checked on the host, which would have to wait for the device to see them; none of
// them makes a kernel read or write elsewhere, since a document's number stays below `documents`.
class Document {
 public:
  int number;

  DEVICE Document(const int32_t* cu_seqlens, int documents, int tokens_each, int row) : bounds_(cu_seqlens), documents_(documents), each_(tokens_each) {
    if (!bounds_) {
      number = row / each_;
      set_bounds();
      return;
    }
    int low = 0, high = documents;  // the last document that starts at or before `row`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (bounds_[middle] <= row) low = middle;
      else high = middle;
    }
    number = low;
    set_bounds();
  }
  // To the next row, or the one before the first asked for.
  DEVICE void move_to(int row) {
    while (row >= end_ && number + 1 < documents_) number++, set_bounds();
  }
  DEVICE bool starts_at(int row) const { return row == begin_ || row == 0; }

 private:
  const int32_t* bounds_;
  int documents_, each_, begin_, end_;

  DEVICE void set_bounds() {
    begin_ = bounds_ ? bounds_[number] : number * each_;
    end_ = bounds_ ? bounds_[number + 1] : begin_ + each_;
    require(begin_ >= 0 && begin_ <= end_, "cu_seqlens decreases or begins below 0");
  }
};

template <int kMixes>
struct Shift {
  const void *x, *last;
  const int32_t* cu_seqlens;
  const void* mix[kMixes];
  int rows, tokens_each, documents, width;
};

// What the first row of a document follows.
template <class T, int kMixes>
DEVICE void load_last(float (&to)[kVector], const Shift<kMixes>& p, int document, int channel) {
  load_vector<T>(to, p.last, int64_t(document) * p.width + channel, p.last != nullptr);
}

template <int kMixes>
struct Forward {
  Shift<kMixes> shift;
  void* out[kMixes];
};

template <int kMixes, class T>
__global__ void __launch_bounds__(kTileThreads) token_shift_forward(Forward<kMixes> all) {
  const Shift<kMixes>& p = all.shift;
  const Tile tile(p.rows, p.width);
  if (!tile.active || tile.row >= tile.end) return;
  float mix[kMixes][kVector], before[kVector];
#pragma unroll
  for (int i = 0; i < kMixes; i++) load_vector<T>(mix[i], p.mix[i], tile.channel);
  Document document(p.cu_seqlens, p.documents, p.tokens_each, tile.row);
  load_vector<T>(before, p.x, int64_t(tile.row - 1) * p.width + tile.channel, tile.row > 0);
  for (int row = tile.row; row < tile.end; row++) {
    const int64_t at = int64_t(row) * p.width + tile.channel;
    float now[kVector];
    load_vector<T>(now, p.x, at);
    document.move_to(row);
    if (document.starts_at(row)) load_last<T>(before, p, document.number, tile.channel);
#pragma unroll
    for (int i = 0; i < kMixes; i++) {
      float mixed[kVector];
#pragma unroll
      for (int c = 0; c < kVector; c++) mixed[c] = now[c] + (before[c] - now[c]) * mix[i][c];
      store_vector<T>(all.out[i], at, mixed);
    }
#pragma unroll
    for (int c = 0; c < kVector; c++) before[c] = now[c];
  }
}

template <int kMixes>
struct Backward {
  Shift<kMixes> shift;
  const void* d[kMixes];
  void *dx, *dlast;  // dlast may be null
  float* partial;    // [tiles, kMixes, width]
};

// What row `at` gives to the row before it.
template <class T, int kMixes>
DEVICE void load_back(float (&back)[kVector], const Backward<kMixes>& all, const float (&mix)[kMixes][kVector], int64_t at) {
  clear(back);
#pragma unroll
  for (int i = 0; i < kMixes; i++) {
    float d[kVector];
    load_vector<T>(d, all.d[i], at);
#pragma unroll
    for (int c = 0; c < kVector; c++) back[c] += d[c] * mix[i][c];
  }
}

template <int kMixes, class T>
__global__ void __launch_bounds__(kTileThreads) token_shift_backward(Backward<kMixes> all) {
  SHARED_MEMORY(shared);
  const Shift<kMixes>& p = all.shift;
  const Tile tile(p.rows, p.width);
  float sums[kMixes][kVector];
#pragma unroll
  for (int i = 0; i < kMixes; i++) clear(sums[i]);
  if (tile.active && tile.row < tile.end) {
    float mix[kMixes][kVector], before[kVector], unfinished[kVector];  // dx of the row before, without what the next one gives back
#pragma unroll
    for (int i = 0; i < kMixes; i++) load_vector<T>(mix[i], p.mix[i], tile.channel);
    Document document(p.cu_seqlens, p.documents, p.tokens_each, tile.row);
    load_vector<T>(before, p.x, int64_t(tile.row - 1) * p.width + tile.channel, tile.row > 0);
    clear(unfinished);
    for (int row = tile.row; row < tile.end; row++) {
      const int64_t at = int64_t(row) * p.width + tile.channel;
      float now[kVector], whole[kVector], back[kVector];
      load_vector<T>(now, p.x, at);
      document.move_to(row);
      const bool starts = document.starts_at(row);
      if (starts) load_last<T>(before, p, document.number, tile.channel);
      clear(whole), clear(back);
#pragma unroll
      for (int i = 0; i < kMixes; i++) {
        float d[kVector];
        load_vector<T>(d, all.d[i], at);
#pragma unroll
        for (int c = 0; c < kVector; c++) {
          whole[c] += d[c];
          back[c] += d[c] * mix[i][c];
          sums[i][c] += d[c] * (before[c] - now[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kVector; c++) unfinished[c] += starts ? 0.0f : back[c];
      if (row > tile.row) store_vector<T>(all.dx, at - p.width, unfinished);
      if (starts && all.dlast) store_vector<T>(all.dlast, int64_t(document.number) * p.width + tile.channel, back);
#pragma unroll
      for (int c = 0; c < kVector; c++) unfinished[c] = whole[c] - back[c], before[c] = now[c];
    }
    const int64_t end = int64_t(tile.end) * p.width + tile.channel;
    if (tile.end < p.rows) {
      document.move_to(tile.end);
      if (!document.starts_at(tile.end)) {
        float back[kVector];
        load_back<T>(back, all, mix, end);
#pragma unroll
        for (int c = 0; c < kVector; c++) unfinished[c] += back[c];
      }
    }
    store_vector<T>(all.dx, end - p.width, unfinished);
  }
  close_tile<kMixes>(tile, p.width, sums, shared, all.partial);
}

template <int kMixes>
Shift<kMixes> shift_of(int64_t rows, int64_t tokens_each, int documents, int width, const void* x, const void* last, const int32_t* cu_seqlens,
                       const void* const* mix) {
  Shift<kMixes> shift{x, last, cu_seqlens, {}, int(rows), int(tokens_each), documents, width};
  for (int i = 0; i < kMixes; i++) shift.mix[i] = mix[i];
  return shift;
}

template <int kMixes, class T>
int run_forward(const Shift<kMixes>& shift, void* const* out, int64_t stream) {
  Forward<kMixes> p{shift, {}};
  for (int i = 0; i < kMixes; i++) p.out[i] = out[i];
  return launch(token_shift_forward<kMixes, T>, tile_blocks(shift.rows, shift.width), kTileThreads, 0, stream, p);
}

template <int kMixes, class T>
int run_backward(const Shift<kMixes>& shift, const void* const* d, void* dx, void* dlast, void* const* dmix, float* partial, int64_t stream) {
  Backward<kMixes> p{shift, {}, dx, dlast, partial};
  SumTargets targets{};
  for (int i = 0; i < kMixes; i++) p.d[i] = d[i], targets.at[i] = dmix[i];
  const unsigned blocks = tile_blocks(shift.rows, shift.width);
  if (const int code = launch(token_shift_backward<kMixes, T>, blocks, kTileThreads, tile_sum_bytes(kMixes), stream, p)) return code;
  return launch_add_tiles<T>(partial, targets, kMixes, shift.rows, shift.width, stream);
}

}  // namespace

extern "C" {

// Return 0, a CUDA error number, or -1 for another dtype or number of mixes (there are kernels for 1, 3 and 6). All pointers are to the current device
// and multiples of 16; x [rows, width], last [documents, width] or null, width a multiple of 4. Without cu_seqlens a document has tokens_each rows.

// fp32 numbers of the buffer that backward needs.
int64_t token_shift_partial_numbers(int mixes, int64_t rows, int width) { return partial_numbers(rows, width, mixes); }

int token_shift_forward(int dtype, int mixes, int64_t rows, int64_t tokens_each, int documents, int width, const void* x, const void* last,
                        const int32_t* cu_seqlens, const void* const* mix, void* const* out, int64_t stream) {
  return by_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    if (mixes == 1) return run_forward<1, T>(shift_of<1>(rows, tokens_each, documents, width, x, last, cu_seqlens, mix), out, stream);
    if (mixes == 3) return run_forward<3, T>(shift_of<3>(rows, tokens_each, documents, width, x, last, cu_seqlens, mix), out, stream);
    if (mixes == 6) return run_forward<6, T>(shift_of<6>(rows, tokens_each, documents, width, x, last, cu_seqlens, mix), out, stream);
    return kNoSuchKernel;
  });
}

// dlast [documents, width] may be null; it is written only for documents with tokens. dmix: as many pointers as mixes, each to [width].
int token_shift_backward(int dtype, int mixes, int64_t rows, int64_t tokens_each, int documents, int width, const void* const* d, const void* x,
                         const void* last, const int32_t* cu_seqlens, const void* const* mix, void* dx, void* dlast, void* const* dmix,
                         float* partial, int64_t stream) {
  return by_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    if (mixes == 1)
      return run_backward<1, T>(shift_of<1>(rows, tokens_each, documents, width, x, last, cu_seqlens, mix), d, dx, dlast, dmix, partial, stream);
    if (mixes == 3)
      return run_backward<3, T>(shift_of<3>(rows, tokens_each, documents, width, x, last, cu_seqlens, mix), d, dx, dlast, dmix, partial, stream);
    if (mixes == 6)
      return run_backward<6, T>(shift_of<6>(rows, tokens_each, documents, width, x, last, cu_seqlens, mix), d, dx, dlast, dmix, partial, stream);
    return kNoSuchKernel;
  });
}
}
