"""How long saving the full state of the 34.2 M model stops training, beside the time that writing it takes in the
background. The CPU time of the stop is that of a copy, whatever else the machine does (with OMP_NUM_THREADS=1).

python tests/bench/save_state.py [FOLDER]      FOLDER: the disk to write to (default: here)
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from src.config import ModelConfig, RunConfig
from src.model import RWKV7
from src.training.checkpoint.parts import whole_part
from src.training.checkpoint.storage import StateWriter
from src.training.optim import MasterAdamW, parameter_groups

SAVES = 5


def main() -> None:
    model = RWKV7(ModelConfig(n_layer=8, n_embd=512, vocab_size=6400))
    optimizer = MasterAdamW(parameter_groups(model, 0.0), lr=1e-4, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    parts = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors = {"master": optimizer.master_of(parameter), **optimizer.moments(parameter)}
        parts += [whole_part(f"{name}/{kind}", tensor) for kind, tensor in tensors.items() if kind != "step"]
    size = sum(part.size for part in parts)
    print(f"L8-D512, {sum(p.numel() for p in model.parameters()):,} parameters: a state of {size / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else ".") as folder:
        writer = StateWriter(Path(folder), keep=2)
        writer.prepare(parts)  # as after the first step of a run
        time.sleep(5)
        stops = []
        for step in range(SAVES):
            begin, cpu = time.perf_counter(), time.thread_time()
            writer.write(step, {}, parts)
            stops.append(time.perf_counter() - begin)
            cpu = time.thread_time() - cpu
            writer.wait()
            whole = time.perf_counter() - begin
            stop = f"training stops {stops[-1]:.3f} s ({cpu:.3f} s of CPU time)"
            print(f"save {step}: {stop}, on the disk after {whole:.2f} s")
    worst, minutes = max(stops), RunConfig.save_minutes
    print(f"worst stop {worst:.3f} s; every {minutes:g} minutes that is {worst / (60 * minutes):.3%} of a run")


if __name__ == "__main__":
    main()
