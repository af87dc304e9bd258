"""The names of the files in --proj_dir."""

INIT, FINAL, BEST = "rwkv-init.pth", "rwkv-final.pth", "rwkv-best.pth"
LOG, METRICS, VALIDATION, SAMPLES, RUN = "train_log.txt", "metrics.csv", "val.csv", "samples.json", "run.json"
PICTURE, REPORT, TRACE = "loss.png", "report.html", "profile.json.gz"
# what belongs to one run, beside its weights
KEPT = (LOG, METRICS, VALIDATION, SAMPLES, RUN, PICTURE, REPORT, TRACE, "resume", "wandb", "tensorboard", "csv")
