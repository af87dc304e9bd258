// Schemas of a block's elementwise ops (src/ops/elementwise.py has the formulas and registers shapes and gradients). All tensors of a call have one
// dtype: float32 or bfloat16, on a GPU float16 too. x, k, v ... [B, T, C]; mixes and other vectors have C numbers. An output that doesn't exist is empty.
#pragma once

constexpr const char* kTokenShift1 = "token_shift_1(Tensor x, Tensor? last, Tensor? cu_seqlens, Tensor mix) -> Tensor";
constexpr const char* kTokenShift1Backward =
    "token_shift_1_backward(Tensor d, Tensor x, Tensor? last, Tensor? cu_seqlens, Tensor mix) -> (Tensor dx, Tensor dlast, Tensor dmix)";
constexpr const char* kTokenShift3 =
    "token_shift_3(Tensor x, Tensor? last, Tensor? cu_seqlens, Tensor r, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)";
constexpr const char* kTokenShift3Backward =
    "token_shift_3_backward(Tensor dr, Tensor dk, Tensor dv, Tensor x, Tensor? last, Tensor? cu_seqlens, Tensor r, Tensor k, Tensor v)"
    " -> (Tensor dx, Tensor dlast, Tensor, Tensor, Tensor)";
constexpr const char* kTokenShift6 =
    "token_shift_6(Tensor x, Tensor? last, Tensor? cu_seqlens, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kTokenShift6Backward =
    "token_shift_6_backward(Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor dg, Tensor x, Tensor? last, Tensor? cu_seqlens,"
    " Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g) -> (Tensor dx, Tensor dlast, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kTimeMixInputs =
    "time_mix_inputs(Tensor k, Tensor v, Tensor a, Tensor? v_first, Tensor? residual, Tensor k_k, Tensor k_a, Tensor a0, Tensor? v0, int head_size)"
    " -> (Tensor key, Tensor value, Tensor remove, Tensor replace)";
constexpr const char* kTimeMixInputsBackward =
    "time_mix_inputs_backward(Tensor dkey, Tensor dvalue, Tensor dremove, Tensor dreplace, Tensor k, Tensor v, Tensor a, Tensor? v_first,"
    " Tensor? residual, Tensor k_k, Tensor k_a, Tensor a0, Tensor? v0, int head_size)"
    " -> (Tensor dk, Tensor dv, Tensor da, Tensor dv_first, Tensor dresidual, Tensor dk_k, Tensor dk_a, Tensor da0, Tensor dv0)";
constexpr const char* kTimeMixOutput =
    "time_mix_output(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, float eps, int head_size) -> Tensor";
constexpr const char* kTimeMixOutputBackward =
    "time_mix_output_backward(Tensor dout, Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, float eps,"
    " int head_size) -> (Tensor dy, Tensor dr, Tensor dk, Tensor dv, Tensor dg, Tensor dr_k, Tensor dweight, Tensor dbias)";
constexpr const char* kReluSquared = "relu_squared(Tensor x) -> Tensor";
constexpr const char* kReluSquaredBackward = "relu_squared_backward(Tensor dy, Tensor x) -> Tensor";
