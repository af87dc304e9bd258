// What the elementwise kernels share: vectors of four numbers, blocks that own a tile of rows by channels, and sums over all rows.
//
// x [rows, width] is cut into tiles of 64 rows by 128 channels. A tile is a block of 8 warps; each warp walks down 8 rows, each lane keeps 4 channels,
// so vectors of parameters and sums over rows stay in registers, and a row's 128 channels are one access of whole sectors. Sums over all rows are
// taken in two stages, each in a fixed order and without atomics: two runs give equal bits.
#pragma once
#include "port.cuh"

namespace {

using namespace port;

constexpr int kNoSuchKernel = -1;  // what entry points return for sizes or dtypes that they don't serve
constexpr int kVector = 4;         // channels of a thread; width is a multiple of it
constexpr int kTileWarps = 8, kWarpRows = 8, kTileRows = kTileWarps * kWarpRows;
constexpr int kTileChannels = kWarpSize * kVector, kTileThreads = kTileWarps * kWarpSize;

inline int64_t row_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int column_tiles(int width) { return (width + kTileChannels - 1) / kTileChannels; }
inline unsigned tile_blocks(int64_t rows, int width) { return unsigned(row_tiles(rows) * column_tiles(width)); }

// The rows and channels of a thread. Lanes beyond `width` have no channels, but take part in barriers and shuffles.
struct Tile {
  int row, end;  // of its warp; no rows where row >= end
  int number;    // of the tile among those of its channels
  int channel;   // the first of kVector
  bool active;

  DEVICE Tile(int rows, int width) {
    const int columns = (width + kTileChannels - 1) / kTileChannels, thread = int(threadIdx.x);
    number = int(blockIdx.x) / columns;
    channel = int(blockIdx.x) % columns * kTileChannels + thread % kWarpSize * kVector;
    active = channel < width;
    row = number * kTileRows + thread / kWarpSize * kWarpRows;
    end = row + kWarpRows < rows ? row + kWarpRows : rows;
  }
};

template <class T>
DEVICE void load_vector(float (&to)[kVector], const void* x, int64_t at) {
  const T* const from = static_cast<const T*>(x) + at;
  if constexpr (sizeof(T) == 4) {
    load_floats(to, from);
  } else {
    uint32_t words[2];
    load8(from, words[0], words[1]);
#pragma unroll
    for (int i = 0; i < kVector; i++) to[i] = to_float(T{uint16_t(words[i / 2] >> (16 * (i % 2)))});
  }
}
template <class T>
DEVICE void store_vector(void* x, int64_t at, const float (&from)[kVector]) {
  T* const to = static_cast<T*>(x) + at;
  if constexpr (sizeof(T) == 4)
    store_floats(to, from);
  else
    store8(to, pack(from_float<T>(from[0]), from_float<T>(from[1])), pack(from_float<T>(from[2]), from_float<T>(from[3])));
}
DEVICE void clear(float (&x)[kVector]) { x[0] = x[1] = x[2] = x[3] = 0.0f; }
// The same of `active` lanes, zeros of the others.
template <class T>
DEVICE void load_vector(float (&to)[kVector], const void* x, int64_t at, bool active) {
  clear(to);
  if (active) load_vector<T>(to, x, at);
}

// 1 / (1 + e^-x); the hardware's approximation (2^-22) for 16-bit numbers.
template <class T>
DEVICE float sigmoid(float x) {
  if constexpr (sizeof(T) == 4)
    return 1.0f / (1.0f + exact_exp(-x));
  else
    return fast_divide(1.0f, 1.0f + fast_exp2(-kLog2E * x));
}

// --- Sums over rows ----------------------------------------------------------------------------------------------------

// Bytes of shared memory that close_tile needs.
constexpr size_t tile_sum_bytes(int sums) { return size_t(sums) * kTileWarps * kTileChannels * sizeof(float); }
// Numbers of `partial`, fp32 [tiles, sums, width].
inline int64_t partial_numbers(int64_t rows, int width, int sums) { return row_tiles(rows) * sums * width; }

// First stage: adds the sums of a block's warps and writes them to `partial`. All threads of the block call it.
template <int kSums>
DEVICE void close_tile(const Tile& tile, int width, const float (&sums)[kSums][kVector], unsigned char* shared, float* partial) {
  float* const of_warps = reinterpret_cast<float*>(shared);  // [kTileWarps, kSums, kTileChannels]
  const int thread = int(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
#pragma unroll
  for (int i = 0; i < kSums; i++) store_floats(of_warps + (warp * kSums + i) * kTileChannels + lane * kVector, sums[i]);
  sync_block();
  const int first_channel = tile.channel - lane * kVector;
  for (int i = thread; i < kSums * kTileChannels; i += kTileThreads) {
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < kTileWarps; other++) total += of_warps[other * kSums * kTileChannels + i];
    const int channel = first_channel + i % kTileChannels;
    if (channel < width) partial[(int64_t(tile.number) * kSums + i / kTileChannels) * width + channel] = total;
  }
}

constexpr int kMostSums = 6;
struct SumTargets {
  void* at[kMostSums];  // each [width]; null: not wanted
};

// Second stage: adds up `partial` over the tiles. A block has 32 of the sums * width columns, each warp every 8th tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads) add_tiles(const float* partial, SumTargets to, int tiles, int columns, int width) {
  SHARED_MEMORY(shared);
  float* const of_warps = reinterpret_cast<float*>(shared);  // [kTileWarps, kWarpSize]
  const int thread = int(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int column = int(blockIdx.x) * kWarpSize + lane;
  float total = 0.0f;
  if (column < columns)
#pragma unroll 8
    for (int tile = warp; tile < tiles; tile += kTileWarps) total += partial[int64_t(tile) * columns + column];
  of_warps[thread] = total;
  sync_block();
  if (warp != 0 || column >= columns) return;
#pragma unroll
  for (int other = 1; other < kTileWarps; other++) total += of_warps[other * kWarpSize + lane];
  T* const target = static_cast<T*>(to.at[column / width]);
  if (target) target[column % width] = from_float<T>(total);
}

// 0 or the runtime's error number.
template <class T>
int launch_add_tiles(const float* partial, const SumTargets& to, int sums, int64_t rows, int width, int64_t stream) {
  const int columns = sums * width;
  const unsigned blocks = unsigned((columns + kWarpSize - 1) / kWarpSize);
  return launch(add_tiles<T>, blocks, kTileThreads, kTileThreads * sizeof(float), stream, partial, to, int(row_tiles(rows)), columns, width);
}

// Calls `run(T{})` for a dtype's number (0: fp32, 1: bf16, 2: fp16).
template <class F>
int by_dtype(int dtype, const F& run) {
  switch (dtype) {
    case 0: return run(float{});
    case 1: return run(bf16{});
    case 2: return run(fp16{});
    default: return kNoSuchKernel;
  }
}

}  // namespace
