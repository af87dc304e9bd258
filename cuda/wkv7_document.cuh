// What both WKV7 kernels share: the part of the work that a block has, and a constant.
#pragma once
#include "port.cuh"

namespace {

using namespace port;

constexpr float kDecayScale = -0.6065306597126334f;  // -exp(-0.5)
constexpr int kNoSuchKernel = -1;                     // what entry points return for sizes or dtypes that they don't serve

// One head of one document. Kept states lie one after another, one every `slot_tokens` tokens; a document that starts at token s begins at slot
// s / slot_tokens + document, which leaves room for every earlier document's partial last slot.
//
// cu_seqlens is not checked on the host, which would have to wait for the device to see its values. What is out of range is clamped to the
// tokens that exist (tokens_each of them), so that no value of it makes a kernel read or write elsewhere.
template <class Index>
struct DocumentOf {
  Index begin, end, first_slot;
  int number, head;

  DEVICE DocumentOf(const int32_t* cu_seqlens, int64_t tokens_each, int heads, int slot_tokens) {
    number = int(blockIdx.x) / heads;
    head = int(blockIdx.x) % heads;
    begin = Index(number * tokens_each);
    end = Index(begin + tokens_each);
    if (cu_seqlens) {
      const int32_t tokens = int32_t(tokens_each), first = cu_seqlens[number], last = cu_seqlens[number + 1];
      require(first >= 0 && first <= last && last <= tokens, "cu_seqlens decreases or leaves the range from 0 to T");
      const int32_t from = first < 0 ? 0 : first < tokens ? first : tokens;
      begin = from;
      end = last < from ? from : last < tokens ? last : tokens;
    }
    first_slot = begin / slot_tokens + number;
  }
  DEVICE int64_t matrix(int heads, int size) const { return (int64_t(number) * heads + head) * size * size; }  // where its state begins
};

}  // namespace
