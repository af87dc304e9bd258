"""The full state of a run: storage (how it lies on disk), state (what is in it), resume (where to start), callbacks
(when).

A state is a folder of parts with a manifest that lists them. Rank 0 writes all parts today; other ranks send it their
partitions. The format leaves room for each rank to write its own.
"""
