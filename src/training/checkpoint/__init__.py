"""The full state of a run: parts (what a rank holds of it), storage (how it is written), reader and restore (how it is
read), state (the rest of it), resume (where to start), callbacks (when).

A state is a folder of files with a manifest that lists them. Each rank writes its own files, and reads what it needs of
those of all.
"""
