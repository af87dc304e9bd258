"""The full state of a run: storage (how it lies on disk), state (what is in it), resume (where to start), callbacks
(when).

A state is a folder of parts with a manifest. Each process writes the parts that it holds; one process is the case of
one writer.
"""
