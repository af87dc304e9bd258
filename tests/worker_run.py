"""train.py on a CPU with the DataLoader's worker process that only runs on a GPU have. `python -m tests.worker_run
[--fail] FLAGS`

One batch is fetched ahead, so that every micro step needs the worker. With --fail the sixth micro step raises an error.
"""

import sys

import train
from src.dataset import loader
from src.training import module


class LoaderWithWorker(loader.DataLoader):
    def __init__(self, dataset, **settings):
        super().__init__(dataset, **{**settings, "num_workers": 1, "persistent_workers": True, "prefetch_factor": 1})


def failing_step(self, batch, batch_idx):
    if batch_idx == 5:
        raise RuntimeError("a step that fails")
    return training_step(self, batch, batch_idx)


loader.DataLoader = LoaderWithWorker
training_step = module.TrainingModule.training_step
if sys.argv[1] == "--fail":
    del sys.argv[1]
    module.TrainingModule.training_step = failing_step
sys.exit(train.main())
