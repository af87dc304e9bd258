// A product by TMA and wgmma, right or with one mistake of each kind that the host run is there to find.
#include "port.cuh"

namespace {

using namespace port;

enum Mistake {
  kNone, kNoWait, kNoFence, kPhaseBefore, kPhaseThatNeverEnds, kStride, kNoSwizzle, kBeyondShared, kMiddleOfRows, kTooFarRight, kNoGroupFence,
  kReadTooEarly, kOperandChanges, kNeverWaited, kLanesDiffer, kNoInitialisation, kInitialisationUnfenced, kTooFewBytes, kUnseenStore, kOtherShape,
  kArrivesTwice, kLoadsTooEarly, kGroupIncomplete, kRegisters, kTmaOverStores, kNoBarrier, kOutlivesBlock, kStoreWhileArriving, kTransposedHalf
};

// d = a b^T for a [64, 64] (of which a_transposed says that it is given as [k, m]) and b [64, 64] (b_transposed: [k, n]).
// a comes by TMA, or with registers != 0 from memory; b by stores.
__global__ void planted(const __grid_constant__ Rows a, const bf16* a_values, const bf16* b_values, float* d, int a_transposed, int b_transposed,
                        int registers, int mistake) {
  SHARED_MEMORY(shared);
  unsigned char *const a_tile = shared, *const b_tile = shared + 8192;
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared + 16384);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  if (thread == 0) {
    if (mistake != kNoInitialisation) mbarrier_init(barrier, 1);
    if (mistake == kTmaOverStores) store4(a_tile, 0);
    if (mistake != kInitialisationUnfenced && mistake != kTmaOverStores) fence_async_proxy();
    mbarrier_expect(barrier, mistake == kTooFewBytes ? 4096 : 8192);
    load_rows(a_tile, a, 0, 0, barrier);
    if (mistake == kArrivesTwice) mbarrier_arrive(barrier);
  }
  for (int i = thread; i < 512; i += 128)
    store16(b_tile + i / 8 * 128 + ((i % 8 ^ i / 8 % 8) << 4), load16(b_values + i * 8));
  if (mistake == kUnseenStore && thread == 5) *reinterpret_cast<uint16_t*>(b_tile + 5 * 16) = 7;
  if (mistake != kNoFence) fence_async_proxy();
  if (mistake == kRegisters) registers_increase<100>();
  if (mistake != kNoBarrier && (mistake != kGroupIncomplete || warp < 3)) sync_group(1, 128);
  if (mistake == kLoadsTooEarly && thread == 0) d[0] = bits_to_float(load4(a_tile));
  if (mistake == kStoreWhileArriving && thread == 0) store4(a_tile, 0);
  if (mistake == kOutlivesBlock) return;
  if (mistake != kNoWait) mbarrier_wait(barrier, mistake == kPhaseBefore ? 1 : 0);
  if (mistake == kPhaseThatNeverEnds) mbarrier_wait(barrier, 1);

  const uint64_t at_a = tile_descriptor(a_tile);
  uint64_t at_b = tile_descriptor(b_tile);
  if (mistake == kStride) at_b += uint64_t(64) << 32;
  if (mistake == kNoSwizzle) at_b &= ~(uint64_t(3) << 62);
  if (mistake == kBeyondShared) at_b += 512;
  if (mistake == kMiddleOfRows) at_b += 8;
  if (mistake == kTooFarRight) at_b += 7;
  if (mistake == kLanesDiffer && warp == 2) at_b -= 64;
  float x[32];
  uint32_t operand[16];
  for (int i = 0; i < 16; i++) {
    const bf16* const from = a_values + (16 * warp + g + 8 * (i % 2)) * 64 + i / 2 * 8 + 2 * q;
    operand[i] = pack(from[0], from[1]);
  }
  if (mistake != kNoGroupFence) group_fence();
  for (int k = 0; k < 4; k++) {
    const uint64_t step_a = at_a + (a_transposed ? 128 : 2) * k, step_b = at_b + (b_transposed ? 128 : 2) * k;
    if (registers && b_transposed) group_product<true, 64>(x, operand + 4 * k, step_b, k > 0);
    if (registers && !b_transposed) group_product<false, 64>(x, operand + 4 * k, step_b, k > 0);
    if (!registers && a_transposed && b_transposed) group_product<true, true, 64>(x, step_a, step_b, k > 0);
    if (!registers && a_transposed && !b_transposed) group_product<true, false, 64>(x, step_a, step_b, k > 0);
    if (!registers && !a_transposed && b_transposed) group_product<false, true, 64>(x, step_a, step_b, k > 0);
    if (!registers && !a_transposed && !b_transposed) group_product<false, false, 64>(x, step_a, step_b, k > 0);
  }
  if (mistake == kOtherShape) group_product<false, false, 32>(*reinterpret_cast<float(*)[16]>(x), at_a, at_b, true);
  if (mistake == kTransposedHalf) {
    float y[16];
    group_product<false, true, 32>(y, at_a, at_b, false);
  }
  group_commit();
  if (mistake == kOperandChanges && thread == 0) store4(b_tile, 0x12345678);
  const float early = x[0];
  if (mistake != kNeverWaited) group_wait<0>();
  for (int i = 0; i < 32; i++) d[(16 * warp + g + 8 * (i / 2 % 2)) * 64 + i / 4 * 8 + 2 * q + i % 2] = mistake == kReadTooEarly ? early : x[i];
}

}  // namespace

extern "C" {
int planted_warpgroups(const void* a, const void* b, float* d, int a_transposed, int b_transposed, int registers, int mistake) {
  Rows rows;
  describe_rows(rows, a, 64, 1, 64);
  return launch_warpgroups(planted, 1, 128, 16384 + 8, 0, rows, static_cast<const bf16*>(a), static_cast<const bf16*>(b), d, a_transposed, b_transposed,
                           registers, mistake);
}
}
