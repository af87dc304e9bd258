"""The full state of a run: what is in it, how it lies on disk, where a run resumes."""
