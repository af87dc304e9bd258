// What both WKV7 kernels share: the part of the work that a block has, and a constant.
#pragma once
#include "port.cuh"

namespace {

using namespace port;

constexpr float kDecayScale = -0.6065306597126334f;  // -exp(-0.5)
constexpr int kNoSuchKernel = -1;                     // what entry points return for sizes or dtypes that they don't serve

// One head of one document. Kept states lie one after another, one every `slot_tokens` tokens; a document that starts at token s begins at slot
// s / slot_tokens + document, which leaves room for every earlier document's partial last slot.
template <class Index>
struct DocumentOf {
  Index begin, end, first_slot;
  int number, head;

  DEVICE DocumentOf(const int32_t* cu_seqlens, int64_t tokens_each, int heads, int slot_tokens) {
    number = int(blockIdx.x) / heads;
    head = int(blockIdx.x) % heads;
    begin = cu_seqlens ? cu_seqlens[number] : Index(number * tokens_each);
    end = cu_seqlens ? cu_seqlens[number + 1] : Index(begin + tokens_each);
    first_slot = begin / slot_tokens + number;
  }
  DEVICE int64_t matrix(int heads, int size) const { return (int64_t(number) * heads + head) * size * size; }  // where its state begins
};

}  // namespace
