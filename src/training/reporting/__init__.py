"""Reports of a run's steps, and everything that receives them: log files, loggers, progress bar, warnings."""
