"""The DataLoader of a rank, and its worker processes, which end with the run and not before."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from torch.utils.data import DataLoader, Dataset

from src.config import RunConfig
from src.dataset.workers import usable_cores


def train_dataloader(config: RunConfig, dataset: Dataset, collate_fn: Callable | None, on_gpu: bool) -> DataLoader:
    """One rank's samples in their order, a micro batch at a time."""
    workers = loader_workers(config, on_gpu)
    return DataLoader(
        dataset,
        batch_size=config.micro_bsz,
        shuffle=False,
        collate_fn=collate_fn,
        worker_init_fn=_leave_signals_to_main_process,
        num_workers=workers,
        # Python 3.14's default puts a server process in between: the worker would take its end for the run's end, and a
        # SIGTERM of the run for one of a stranger.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=bool(workers),
        prefetch_factor=8 if workers else None,  # micro batches: a worker that the system delays doesn't stall the GPU
        pin_memory=on_gpu,
        drop_last=True,
    )


def loader_workers(config: RunConfig, on_gpu: bool) -> int:
    """The number of processes that read samples."""
    # A sample of text is a slice of a memory-mapped file: on a CPU a worker process would cost more than it saves.
    if not config.encoder:
        return 1 if on_gpu else 0
    if config.media_workers >= 0:
        return config.media_workers
    # Pictures are decoded beside the training; on a CPU the cores are the training's already.
    return min(8, usable_cores()) if on_gpu else 0


def _leave_signals_to_main_process(worker: int) -> None:
    """Ctrl-C, a closed terminal and a job's end signal whole process groups: the run still needs its worker to finish
    its step."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # not on Windows, where no SIGTERM is sent to groups, nor on macOS, where no run has a worker
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    """SIGTERM can't be ignored altogether: multiprocessing sends it to a worker that doesn't answer, and waits for its
    end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
