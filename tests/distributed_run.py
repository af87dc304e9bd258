"""Fits of a tiny model in several processes, without the files of a run. Started by tests/test_distributed.py.

    python -m tests.distributed_run OUT SCENARIO.json

SCENARIO.json: {"processes": 2, "fits": {name: {flags of train.py, "optimizer": "sgd" | "adam", "steps": n, ...}}}.
"load": name begins with the full state of another fit; "full_disk": rank fails in a second save of the state.
"weights_file": the initial weights of a partitioned model.
"poison": n makes the loss of the last rank NaN in step n; "stop": [rank, n] lets a rank request a stop in step n.
"count" counts the bytes of collectives up to the beginning of each micro step. Each fit writes OUT/name.pt: losses,
gradient norms, weights, the full state and the type of the engine.
"""

import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from torch.utils.data import Dataset

from src.adapt.adapter import add_adapter
from src.adapt.config import adapter_of
from src.adapt.quantize import quantize_base
from src.config import RunConfig
from src.dataset.loader import train_dataloader
from src.inference.load import load_weights
from src.model import RWKV7
from src.model.weights import save_weights
from src.training.checkpoint import storage
from src.training.checkpoint.gather import gather_weights
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.parts import own_parts, owners, state_parts
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.restore import load_full_state
from src.training.checkpoint.storage import StateWriter, state_folders
from src.training.console import is_rank_zero
from src.training.control import STOP, RunControl
from src.training.distributed import zero
from src.training.distributed.context_parallel import data_parallel
from src.training.distributed.sharded_init import initial_values
from src.training.hardware.selection import choose_hardware, lightning_strategy
from src.training.module import TrainingModule
from src.training.trainer import SetLearningRate
from tests.collective_bytes import CollectiveBytes
from tests.ranks import join_ranks

CTX, VOCAB = 16, 64


class Numbers(Dataset):
    """The samples of a step do not depend on the number of processes: sample n of the run is drawn from seed n."""

    def __init__(self, first_step, steps, rank, world_size, config, poison):
        self.first_step, self.steps, self.config, self.poison = first_step, steps, config, poison
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return self.steps * self.config.accumulate_grad_batches * self.config.micro_bsz

    def __getitem__(self, i):
        micro_step, j = divmod(i, self.config.micro_bsz)
        micro_step += self.first_step * self.config.accumulate_grad_batches
        n = (micro_step * self.config.micro_bsz + j) * self.world_size + self.rank
        tokens = torch.randint(0, VOCAB - 1, (CTX + 1,), generator=torch.Generator().manual_seed(n)).cumsum(0) % VOCAB
        return tokens[:-1], tokens[1:]


class PlainSGD(torch.optim.SGD):
    """Without clipping and moments, which would hide a wrong scale of the gradient."""

    loss_scale = 1.0
    grad_norm = torch.zeros(())
    skipped_steps = torch.zeros(())


class Fit(TrainingModule):
    def __init__(self, *args, optimizer, poison, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind, self.poison = optimizer, poison
        self.losses, self.norms, self.lrs, self.traffic = [], [], [], []

    def configure_model(self):
        _, taken = memory_of(super().configure_model)
        self.taken = getattr(self, "taken", taken)  # of the first call

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.kind == "sgd":
            self.optimizer = PlainSGD(optimizer.param_groups, lr=self.config.lr_init)
        return self.optimizer

    def training_step(self, batch, batch_idx):
        step = batch_idx // self.config.accumulate_grad_batches
        out = super().training_step(batch, batch_idx)
        if (step == self.poison or self.poison == "all") and self.trainer.global_rank == self.trainer.world_size - 1:
            out["loss"] = out["loss"] * float("nan")  # on one rank only
        return out

    def on_train_batch_start(self, batch, batch_idx):
        self.traffic.append(dict(self.collectives.total) if self.collectives else {})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        loss = self.trainer.strategy.reduce(outputs["metrics"]["loss"], reduce_op="mean").item()
        self.losses.append(loss)
        self.norms.append(float(self.optimizer.grad_norm))
        self.lrs.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])


def save(module, folder, result, full_disk=-1):
    """The full state, written by all ranks and read back. `full_disk`: the rank that can't write."""
    writer, parts = StateWriter(folder, keep=9), state_parts(module)
    own = own_parts(parts, owners(parts, writer.group.world_size), writer.group.rank)
    original = storage._write_file
    if writer.group.rank == full_disk:
        storage._write_file = full
    writer.write(len(state_folders(folder)) + 1, {}, own)
    try:
        writer.close()
    except OSError as error:
        result["save_error"] = of_all_ranks(str(error))
    storage._write_file = original
    result.setdefault("written", of_all_ranks(writer.bytes_written))  # of the first save
    return StateReader(state_folders(folder)[0]).tensors()


def write_weights(module, path):
    weights = gather_weights(module.model, path.parent)
    if weights is not None:
        save_weights(weights, path)
    return weights


def memory_of(function):
    """(result, bytes of memory of its own, not of files, that this rank took while it ran, at most)."""
    reached, done = [own_memory()], threading.Event()

    def watch():
        while not done.wait(0.001):
            reached.append(own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        done.set()
        thread.join()
    return result, max(reached) - reached[0]


def own_memory():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def full(path, content):
    raise OSError(28, "No space left on device", str(path))


def of_all_ranks(value):
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def fit(process_group, name, scenario, out):
    scenario = dict(scenario)
    optimizer, steps = scenario.pop("optimizer", "adam"), scenario.pop("steps", 4)
    poison, first_step = scenario.pop("poison", -1), scenario.pop("first_step", 0)
    stop_rank, stop_step = scenario.pop("stop", (-1, -1))
    counts, releases = scenario.pop("count", False), scenario.pop("release", False)
    load, init_seed = scenario.pop("load", None), scenario.pop("init_seed", 5)
    weights_file = scenario.pop("weights_file", "")
    full_disk, seen = scenario.pop("full_disk", -1), {}
    lightning_backward = scenario.pop("lightning_backward", False)
    flags = {
        "n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": VOCAB, "ctx_len": CTX, "micro_bsz": 2,
        "accelerator": "cpu", "precision": "fp32", "lr_init": 1e-2, "lr_final": 1e-3, "weight_decay": 0.1,
        "kernel": "reference", **scenario,
    }  # fmt: skip
    config = RunConfig(**flags)
    if config.precision == "fp16":  # DeepSpeed refuses CPUs without fp16 instructions
        accelerator = zero.import_deepspeed("cpu").accelerator.get_accelerator()
        zero.takes_fp16 = accelerator.is_fp16_supported = lambda *_: True
    hardware = choose_hardware(config)
    values = None
    torch.manual_seed(init_seed)
    if hardware.is_partitioned:
        with torch.device("meta"):
            model = RWKV7(config.model_config(VOCAB))

        def values():
            if weights_file:
                return iter(load_weights(out / weights_file).items())
            torch.manual_seed(init_seed)
            return initial_values(config.model_config(VOCAB))
    else:
        model = RWKV7(config.model_config(VOCAB)).to(hardware.dtype)
    if (adapter := adapter_of(config)) is not None:  # as src/training/model_setup.py does, beside a drawn base
        torch.manual_seed(init_seed + 1)
        with torch.no_grad():  # output and value of a new model are zero: no gradient would reach the adapter
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        if config.quant != "none":
            quantize_base(model, config.quant)
        add_adapter(model, adapter)
    if config.compiles("cpu"):  # as src/training/trainer.py does
        model.compile_blocks()
    module = Fit(model, config, hardware, values=values, optimizer=optimizer, poison=poison)
    ranks = data_parallel(process_group.rank, process_group.world_size, config.context_parallel)
    numbers = Numbers(first_step, steps, *ranks, config, poison)
    control = RunControl(process_group, first_step)
    strategy = lightning_strategy(config, hardware)
    if releases:  # parameters right after their use, as in a model of more than `stage3_max_live_parameters`
        names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
        strategy.config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    if lightning_backward:  # for a negative control
        strategy.precision_plugin.backward = DeepSpeedPrecision("32-true").backward

    class Restore(pl.Callback):
        def on_train_start(self, trainer, module):
            if load:
                saved = torch.load(out / f"{load}.pt")
                for folder in state_folders(out / load):  # a damaged one, and the one before
                    reader = StateReader(folder)
                    try:
                        load_full_state(module, reader, saved["counters"])
                        break
                    except DamagedStateError as error:
                        seen["damage"] = of_all_ranks(str(error))
                seen["read"] = of_all_ranks(reader.bytes_read)
                seen["loaded"] = save(module, out / f"{name}, loaded", {})
                weights = gather_weights(module.model, out) or {}
                seen["loaded weights"] = {name: tensor.clone() for name, tensor in weights.items()}

    class RequestStop(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if (process_group.rank, control.step) == (stop_rank, stop_step):
                control.request(STOP)

    trainer = pl.Trainer(
        accelerator="cpu", devices=hardware.devices, num_nodes=hardware.num_nodes, strategy=strategy,
        precision="32-true", plugins=[process_group.environment], max_epochs=1, max_steps=steps,
        accumulate_grad_batches=config.accumulate_grad_batches, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[
            Restore(), control, SetLearningRate(control, lambda step: config.lr_init / (1 + 0.1 * step)), RequestStop(),
        ],
    )  # fmt: skip
    with CollectiveBytes() if counts else nullcontext() as module.collectives:
        trainer.fit(module, train_dataloader(config, numbers, None, on_gpu=False))
    result = {**seen, "losses": module.losses, "norms": module.norms, "lrs": module.lrs, "traffic": module.traffic}
    result["steps"] = [control.step]  # of each rank
    if process_group.world_size > 1:
        result["steps"] = [0] * process_group.world_size
        dist.all_gather_object(result["steps"], control.step)
    result["engine"] = type(trainer.strategy.model).__name__
    if result["engine"] == "DeepSpeedEngine":
        result["stage"] = trainer.strategy.model.zero_optimization_stage()
    if config.compiles("cpu"):
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result["weights"], taken = memory_of(lambda: write_weights(module, out / f"{name}.pth"))
    result["memory"] = {"build": of_all_ranks(module.taken), "weights": of_all_ranks(taken)}
    if adapter is not None:
        result["frozen"] = sorted(model.frozen_base)
    result["held"] = sum(p.numel() for p in module.model.parameters())
    if optimizer == "adam":
        result["state"] = save(module, out / name, result)
        if full_disk >= 0:
            save(module, out / name, result, full_disk)
        result["counters"] = module.optimizer.counters()
    if is_rank_zero():
        torch.save(result, out / f"{name}.pt")


def main():
    out, scenario = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    process_group = join_ranks(scenario["processes"])
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name, one in scenario["fits"].items():
        fit(process_group, name, {"devices": str(scenario["processes"]), **one}, out)
    process_group.shutdown()


if __name__ == "__main__":
    main()
