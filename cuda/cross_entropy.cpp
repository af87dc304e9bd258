// Schemas of the cross-entropy ops; their makers: cross_entropy_cpu.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv7, m) {
  m.def("cross_entropy_l2wrap_forward(Tensor logits, Tensor targets, int ignore_index) -> (Tensor nll, Tensor largest, Tensor total, Tensor where)");
  m.def(
      "cross_entropy_l2wrap_backward_(Tensor(a!) logits, Tensor targets, Tensor largest, Tensor total, Tensor where, Tensor scale, float l2wrap)"
      " -> ()");
}
