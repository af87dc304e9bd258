// Schema of AdamW's step in one pass (src/ops/adamw.py has the formula), for a GPU. Lists of equal length, tensor by tensor: parameters and gradients of
// one dtype, float32, bfloat16 or float16; masters and both moments float32. A float32 parameter is its own master. The single numbers are float32 [1]
// on the device, which the host doesn't wait for: `steps` done before this one, the learning rate, what the gradients are divided by, and 1 where the
// step is to be left out, else 0.
#pragma once

constexpr const char* kAdamW =
    "adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor steps, Tensor lr,"
    " Tensor grad_scale, Tensor found_inf, float beta1, float beta2, float eps, float weight_decay) -> ()";
