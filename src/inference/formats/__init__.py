"""File formats of other programs, read and written: one module per format, and `convert`, which writes any of them."""
