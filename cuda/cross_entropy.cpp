// Registers the schemas of cross entropy with L2Wrap.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def(kCrossEntropyForward);
  m.def(kCrossEntropyBackward);
}

}  // namespace
