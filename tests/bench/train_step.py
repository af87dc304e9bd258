"""Speed of the whole training step: forward, loss, backward and optimizer, with the objects that train.py trains with.

    python tests/bench/train_step.py                              L8-D512, V 6400, ctx 512, batch 4, fp32, 2 threads
    python tests/bench/train_step.py --compile 1
    python tests/bench/train_step.py --config 0.1b [--micro_bsz 1] [--grad_cp 1 --head_chunk 4096] [--device cuda]
    python tests/bench/train_step.py --profile 1                  also the time of a step by part
    python tests/bench/train_step.py --grad_cp 1 --compare grad_cp    also the ratio to a step with --grad_cp 0

Printed, medians over the steps:
  tokens/s    ctx_len * micro_bsz / seconds of a step
  ratio       6 * P * tokens/s / product rate; P: parameters that are multiplied, all but emb. The product rate is the
              median over the step's own product shapes, [tokens, C] x [C, C], [C, 4C], [4C, C] and [C, V], with the
              same threads, measured before and after each step in the same process: on a CPU with as many operations
              in all as the step has, since processors multiply faster for some milliseconds than they can for longer.
              Steps whose two rates differ by over 25 % are dropped: machines are shared.
  MFU         on a GPU, (6 * P + 24 * n_layer * n_embd * head_size) * tokens/s / the dense peak of its tensor cores
              (src/training/hardware/peak_flops.py, or --peak_tflops): the second term is the recurrence. What gradient
              checkpointing computes twice doesn't count.
  memory      on a GPU the most that the step's tensors took; on a CPU the most that the process took
"""

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.config import RunConfig
from src.model import RWKV7
from src.model.cost import training_flops_per_token
from src.training.hardware.allocator import set_up_malloc
from src.training.hardware.peak_flops import peak_flops
from src.training.hardware.selection import choose_hardware
from src.training.module import TrainingModule

CONFIGS = {  # n_layer, n_embd, vocab_size, ctx_len, micro_bsz, low-rank sizes w, a, v, g (0: by the formula)
    "mini": (8, 512, 6400, 512, 4, (0, 0, 0, 0)),
    "demo": (4, 256, 4096, 256, 8, (0, 0, 0, 0)),
    "0.1b": (12, 768, 65536, 512, 16, (64, 64, 32, 128)),
    "0.4b": (24, 1024, 65536, 512, 16, (64, 64, 32, 128)),
    "1.5b": (24, 2048, 65536, 4096, 8, (96, 96, 64, 256)),
    "2.9b": (32, 2560, 65536, 4096, 4, (96, 96, 64, 320)),
}
CUDA_PRODUCT_FLOPS = 2e12  # of each shape in a measurement of a GPU's product rate: some milliseconds
clock = time.perf_counter  # with --cpu_time the time that the process computed
PARTS = ("GEMM", "wkv7", "elementwise", "loss", "optimizer", "idle")


def settings(args: argparse.Namespace) -> tuple[RunConfig, int]:
    """The run's flags, and the vocabulary."""
    layers, width, vocab, ctx_len, micro_bsz, ranks = CONFIGS[args.config]
    config = RunConfig(
        n_layer=args.n_layer or layers,
        n_embd=args.n_embd or width,
        ctx_len=args.ctx_len or ctx_len,
        micro_bsz=args.micro_bsz or micro_bsz,
        grad_cp=args.grad_cp,
        head_chunk=args.head_chunk,
        compile=args.compile,
        cuda_graph=args.cuda_graph,
        kernel=args.kernel,
        precision=args.precision or ("bf16" if args.device != "cpu" and torch.cuda.is_available() else "fp32"),
        accelerator={"cuda": "gpu"}.get(args.device, args.device),
        weight_decay=0.001,
    )
    config.d_decay_lora, config.d_aaa_lora, config.d_mv_lora, config.d_gate_lora = ranks
    return config, args.vocab_size or vocab


def draw_weights(model: RWKV7) -> None:
    """Normal numbers, and ones for the norms' weights. A step's time doesn't depend on the weights, and the model's
    own orthogonal matrices would take a minute of QR decompositions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" in name and name.endswith(".weight"):
                parameter.fill_(1)
            else:  # inputs of size 1 give outputs of size 1; vectors stay small
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1)


class Step:
    """One optimizer step after another on random tokens. `micro_steps` batches are accumulated, as
    --accumulate_grad_batches does."""

    def __init__(self, config: RunConfig, vocab: int) -> None:
        self.hardware = choose_hardware(config)
        self.device = torch.device("cuda" if self.hardware.accelerator == "gpu" else "cpu")
        torch.manual_seed(0)
        with torch.device("meta"):
            model = RWKV7(config.model_config(vocab))
        model = model.to(self.hardware.dtype).to_empty(device=self.device)
        draw_weights(model)
        if config.compiles(self.device.type):  # as src/training/trainer.py does
            model.compile_blocks()
        self.module = TrainingModule(model, config, self.hardware)
        self.optimizer = self.module.configure_optimizers()
        self.module.on_train_start()
        self.tokens = config.ctx_len * config.micro_bsz
        ids = torch.randint(vocab, (config.micro_bsz, config.ctx_len + 1), device=self.device)
        self.batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        self.multiplied = sum(p.numel() for name, p in model.named_parameters() if name != "emb.weight")

    def run(self) -> None:
        # as Lightning calls them: after a replayed CUDA graph the module and the optimizer have nothing left to do
        loss = self.module.training_step(self.batch, 0)["loss"]
        self.module.optimizer_zero_grad(0, 0, self.optimizer)
        self.module.backward(loss)
        with torch.profiler.record_function("part:optimizer"):
            self.optimizer.step()

    def timed(self) -> float:
        self.wait()
        start = clock()
        self.run()
        self.wait()
        return clock() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Products:
    """The machine's rate at the step's own products, GFLOP/s: the median over their shapes. Outputs are allocated
    once."""

    def __init__(
        self, tokens: int, width: int, vocab: int, device: torch.device, dtype: torch.dtype, flops: float
    ) -> None:
        """flops: of a step"""
        shapes = ((width, width), (width, 4 * width), (4 * width, width), (width, vocab))
        self.flops = flops / len(shapes) if device.type == "cpu" else CUDA_PRODUCT_FLOPS
        self.operands = []
        for inner, outer in shapes:
            x, weight = (torch.randn(s, device=device, dtype=dtype) for s in ((tokens, inner), (inner, outer)))
            self.operands.append((x, weight, torch.empty(tokens, outer, device=device, dtype=dtype)))

    def rate(self) -> float:
        rates = []
        for x, weight, out in self.operands:
            repeats = max(1, round(self.flops / (2 * out.numel() * x.shape[1])))
            if x.is_cuda:
                torch.cuda.synchronize()
            start = clock()
            for _ in range(repeats):
                torch.mm(x, weight, out=out)
            if x.is_cuda:
                torch.cuda.synchronize()
            rates.append(repeats * 2 * out.numel() * x.shape[1] / (clock() - start) / 1e9)
        return statistics.median(rates)


def part_of(event: "torch.autograd.profiler_util.FunctionEvent | None", kernel: str = "") -> str:
    """Which part of a step an op of the profile belongs to, or a GPU kernel that it started (None: of no known op)."""
    above, names = event, []
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    if any(name == "part:optimizer" for name in names):
        return "optimizer"
    if any("wkv7_" in name for name in (kernel, *names)):
        return "wkv7"
    own = names[0] if names else ""
    if (
        any(own == f"aten::{op}" for op in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "mkldnn_linear"))
        or "mkl_linear" in own
        or own == "rwkv7::weight_gradient"
    ):
        return "GEMM"
    if any("CrossEntropy" in name or "cross_entropy" in name or name == "part:loss" for name in names):
        return "loss"
    return "idle" if own.startswith("autograd::") and not kernel else "elementwise"


def gpu_split(events: "Iterable[torch.autograd.profiler_util.FunctionEvent]") -> dict[str, float]:
    """Milliseconds of GPU kernels by part. Marks of the host (record_function) stand on the GPU's line too and are no
    kernels."""
    events = list(events)
    marks = {event.name for event in events if event.is_user_annotation}
    spent: dict[str, float] = defaultdict(float)
    known: Counter[str] = Counter()  # kernels whose op is known; a compiled graph starts some under no op's name
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            for kernel in event.kernels:
                if kernel.name not in marks:
                    known[kernel.name] += 1
                    spent[part_of(event, kernel.name)] += kernel.duration / 1e3
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in marks:
            if known[event.name]:
                known[event.name] -= 1
            else:
                spent[part_of(None, event.name)] += event.time_range.elapsed_us() / 1e3
    return dict(spent)


def split(step: Step, milliseconds: float, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by part. A GPU's are those of its kernels; idle is what they leave of `milliseconds`, a
    step's without a profiler, which slows the host. On a CPU idle is the time in no op."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = step.device.type == "cuda"
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    head_loss = step.module.objective.head_loss
    forward = head_loss.forward

    def marked(*args: torch.Tensor) -> torch.Tensor:
        with torch.profiler.record_function("part:loss"):
            return forward(*args)

    head_loss.forward = marked  # type: ignore[method-assign]
    with torch.profiler.profile(activities=activities) as profile:
        seconds = sum(step.timed() for _ in range(steps))
    head_loss.forward = forward  # type: ignore[method-assign]
    spent: dict[str, float] = defaultdict(float)
    if gpu:
        spent |= {part: time / steps for part, time in gpu_split(profile.events()).items()}
        spent["idle"] = max(0.0, milliseconds - sum(spent.values()))
        return dict(spent)
    for event in profile.events():
        spent[part_of(event)] += event.self_cpu_time_total / 1e3 / steps
    spent["idle"] = 1e3 * seconds / steps - sum(spent[part] for part in PARTS if part != "idle")
    return dict(spent)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", choices=list(CONFIGS))
    for name in ("n_layer", "n_embd", "vocab_size", "ctx_len", "micro_bsz"):
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help="instead of the configuration's")
    parser.add_argument("--compile", choices=("auto", "0", "1"), default="0")
    parser.add_argument("--cuda_graph", choices=("auto", "on", "off"), default="off")
    parser.add_argument("--grad_cp", type=int, default=0)
    parser.add_argument("--head_chunk", type=int, default=0)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--precision", default="", help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4, help="steps before: fresh memory is dear, compiling dearer")
    parser.add_argument("--profile", type=int, default=0, help="1: also the split of a step by part")
    parser.add_argument(
        "--compare",
        default="",
        choices=["", "grad_cp", "compile", "kernel"],
        help="steps with and without this, or with --kernel portable, in turn, in this run: the median of their ratios",
    )
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count the process's CPU time, not what other programs take; for a CPU, with --threads 1",
    )
    parser.add_argument("--peak_tflops", type=float, default=0.0)
    return parser.parse_args()


def main() -> None:
    global clock
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        clock = time.process_time

    config, vocab = settings(args)
    if choose_hardware(config).accelerator == "cpu":
        set_up_malloc(lean=bool(config.grad_cp))  # as train.py does
    step = Step(config, vocab)
    hardware, device = step.hardware, step.device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"L{config.n_layer}-D{config.n_embd}, V {vocab}, ctx {config.ctx_len}, batch {config.micro_bsz}, "
        f"{hardware.precision}, "
        f"compile {config.compile}, cuda_graph {config.cuda_graph}, grad_cp {config.grad_cp}, "
        f"head_chunk {config.head_chunk}, {where}"
    )
    begin = time.perf_counter()
    for _ in range(args.warmup):
        step.timed()
    print(f"{args.warmup} steps of warm-up: {time.perf_counter() - begin:.1f} s")
    if device.type == "cuda":  # before there is anything else
        torch.cuda.reset_peak_memory_stats()
        step.timed()
        print(f"memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    flops = 6 * step.multiplied * step.tokens  # of one step
    products = Products(step.tokens, config.n_embd, vocab, device, hardware.dtype, flops)
    products.rate()

    kept, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(args.steps):
        before = products.rate()
        seconds = step.timed()
        after = products.rate()
        if max(before, after) < 1.25 * min(before, after):
            kept.append((seconds, (before + after) / 2))
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // args.steps
    if not kept:
        raise SystemExit(
            "the product rates before and after every step differ by over 25 %: other programs run; try again later"
        )
    seconds = statistics.median(s for s, _ in kept)
    rate = statistics.median(r for _, r in kept)
    ratio = statistics.median(flops / s / 1e9 / r for s, r in kept)
    print(
        f"tokens/s {step.tokens / seconds:.0f}, {1e3 * seconds:.1f} ms a step, {len(kept)} of {args.steps} steps kept"
    )
    print(f"ratio {ratio:.3f} to the product rate {rate:.0f} GFLOP/s ({flops / 1e9:.0f} GFLOP a step)")
    if device.type == "cuda":
        peak = 1e12 * args.peak_tflops or peak_flops(torch.cuda.get_device_name())
        if peak:
            own = training_flops_per_token(config.model_config(vocab)) * step.tokens
            print(f"MFU {100 * own / seconds / peak:.1f} % of {peak / 1e12:g} TFLOP/s")
    else:
        print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, {faults} page faults a step")
    if args.compare:
        own = getattr(config, args.compare)
        changed = "portable" if args.compare == "kernel" else type(own)(1 - int(own))
        other = Step(dataclasses.replace(config, **{args.compare: changed}), vocab)
        for _ in range(args.warmup):
            other.timed()
        ratios = [step.timed() / other.timed() for _ in range(args.steps)]
        print(
            f"--{args.compare} {own} takes {statistics.median(ratios):.3f} times as long as --{args.compare} {changed} "
            f"({min(ratios):.3f} to {max(ratios):.3f}, {args.steps} pairs of steps)"
        )
    if args.profile:
        spent = split(step, 1e3 * seconds)
        total = sum(spent.values())
        print(
            "split of a step: "
            + ", ".join(
                f"{part} {spent.get(part, 0):.1f} ms ({100 * spent.get(part, 0) / total:.0f} %)" for part in PARTS
            )
        )


if __name__ == "__main__":
    main()
