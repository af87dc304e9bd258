// Schemas of cross entropy with L2Wrap (src/ops/loss.py has the formula). logits [rows, V] float32, bfloat16 or float16, dense;
// targets int64 [rows]. Per row z of logits, all in fp32:
//
//   forward      largest = max z;  where = its first index (int64);  total = sum of exp(z - largest);  nll = log(total) - (z[target] - largest)
//   backward_    z <- scale * (exp(z - largest) / total - onehot(target) + l2wrap * largest * onehot(where))        scale fp32 [rows]
//
// A row whose target is ignore_index has nll 0 (its other results may be anything finite), and scale 0 in backward_.
#pragma once

constexpr const char* kCrossEntropyForward =
    "cross_entropy_l2wrap_forward(Tensor logits, Tensor targets, int ignore_index) -> (Tensor nll, Tensor largest, Tensor total, Tensor where)";
constexpr const char* kCrossEntropyBackward =
    "cross_entropy_l2wrap_backward_(Tensor(a!) logits, Tensor targets, Tensor largest, Tensor total, Tensor where, Tensor scale, float l2wrap)"
    " -> ()";
