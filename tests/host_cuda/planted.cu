// One kernel per kind of mistake, and a right one, to prove that the host run finds what it is there to find.
#include <cstdlib>

#include "port.cuh"

namespace {

using namespace port;

// Neighbours exchange values through shared memory; right when `warp_barrier` (one warp) or `block_barrier` (several) is there.
__global__ void reverse_values(const float* in, float* out, int barrier) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = int(threadIdx.x), last = int(blockDim.x) - 1;
  values[i] = in[i];
  if (barrier == 1) sync_warp();
  if (barrier == 2) sync_block();
  out[i] = values[last - i];
}

// The values are read before they are overwritten only if the threads wait in between.
__global__ void overwrite(const float* in, float* out, int waits) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = int(threadIdx.x), next = (i + 1) % int(blockDim.x);
  values[i] = in[i];
  sync_block();
  const float neighbour = values[next];
  if (waits) sync_block();
  values[i] = neighbour + 1.0f;
  sync_block();
  out[i] = values[next];
}

__global__ void read_unwritten(float* out) {
  SHARED_MEMORY(shared);
  out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
}

__global__ void mismatched_collective(float* out) {
  const float x = float(threadIdx.x);
  if (threadIdx.x < 16)
    out[threadIdx.x] = shuffle_xor(x, 1);
  else
    sync_warp();
}

__global__ void lane_stays_away(float* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = shuffle_xor(float(threadIdx.x), 1);
}

__global__ void warp_stays_away(float* out) {
  out[threadIdx.x] = 0.0f;
  if (threadIdx.x < 32) sync_block();
}

__global__ void different_barriers(float* out) {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    sync_block();
  }
  out[threadIdx.x] = 0.0f;
}

__global__ void copy_and_wait(const float* in, float* out, int wait) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared) + 4 * threadIdx.x;
  copy16_async(values, in + 4 * threadIdx.x, wait == 3 ? 0 : 16);  // of no bytes: zeros
  copy_async_commit();
  if (wait == 1 || wait == 3) copy_async_wait<0>();
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = values[i];
  if (wait == 2) copy_async_wait<0>();  // too late
}

__global__ void misaligned(const float* in, float* out) { store_floats(out + 4 * threadIdx.x, bits_to_float(load16(in + 1).x), 0, 0, 0); }

__global__ void beyond_shared(float* out, int beyond) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[threadIdx.x + beyond] = 1.0f;
  sync_block();
  out[threadIdx.x] = values[threadIdx.x + beyond];
}

__global__ void beyond_output(float* out, int beyond) { out[threadIdx.x + beyond] = 1.0f; }

}  // namespace

extern "C" {
int planted_reverse_values(const float* in, float* out, int threads, int barrier) {
  return launch(reverse_values, 1, unsigned(threads), 4 * size_t(threads), 0, in, out, barrier);
}
int planted_overwrite(const float* in, float* out, int threads, int waits) {
  return launch(overwrite, 1, unsigned(threads), 4 * size_t(threads), 0, in, out, waits);
}
int planted_read_unwritten(float* out) { return launch(read_unwritten, 1, 32, 128, 0, out); }
int planted_mismatched_collective(float* out) { return launch(mismatched_collective, 1, 32, 0, 0, out); }
int planted_lane_stays_away(float* out) { return launch(lane_stays_away, 1, 32, 0, 0, out); }
int planted_warp_stays_away(float* out) { return launch(warp_stays_away, 1, 64, 0, 0, out); }
int planted_different_barriers(float* out) { return launch(different_barriers, 1, 64, 0, 0, out); }
int planted_copy_and_wait(const float* in, float* out, int wait) { return launch(copy_and_wait, 1, 32, 512, 0, in, out, wait); }
int planted_misaligned(const float* in, float* out) { return launch(misaligned, 1, 32, 0, 0, in, out); }
int planted_beyond_shared(float* out, int beyond) { return launch(beyond_shared, 2, 32, 128, 0, out, beyond); }
int planted_beyond_output(float* out, int beyond) { return launch(beyond_output, 1, 32, 0, 0, out, beyond); }
}

#if defined(PLANTED_MAIN)
// For the AddressSanitizer build: `planted shared|output ELEMENTS_BEYOND`, or `planted faults 0`: every fault that leaves threads where they stand.
int main(int, char** arguments) {
  float* out = static_cast<float*>(std::malloc(128 * sizeof(float)));
  if (arguments[1][0] == 'f') {
    for (int order = 0; order < 3; order++) {
      host_cuda_order(order, 1);
      const int found = planted_mismatched_collective(out) + planted_lane_stays_away(out) + planted_warp_stays_away(out) +
                        planted_different_barriers(out) + planted_copy_and_wait(out, out, 0) + planted_misaligned(out, out);
      if (found != 6) return 1;
    }
    std::free(out);
    return 0;
  }
  out = static_cast<float*>(std::realloc(out, 32 * sizeof(float)));
  const int beyond = std::atoi(arguments[2]);
  const int code = arguments[1][0] == 's' ? planted_beyond_shared(out, beyond) : planted_beyond_output(out, beyond);
  std::free(out);
  return code;
}
#endif
