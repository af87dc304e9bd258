"""The names of the files in --proj_dir."""

INIT, FINAL, BEST = "rwkv-init.pth", "rwkv-final.pth", "rwkv-best.pth"
LOG, METRICS, VALIDATION, SAMPLES, RUN = "train_log.txt", "metrics.csv", "val.csv", "samples.json", "run.json"
PICTURE, REPORT, TRACE, TOKENIZER = "loss.png", "report.html", "profile.json.gz", "tokenizer"
# What belongs to one run, beside its weights. RUN comes last: whoever dies while moving them away finds that there is something to move.
KEPT = (
    *(LOG, METRICS, VALIDATION, SAMPLES, PICTURE, REPORT, TRACE, TOKENIZER),
    *("resume", "wandb", "tensorboard", "csv", RUN),
)
