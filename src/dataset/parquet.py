"""Reads Parquet files in batches of rows, with a limit on what one of them takes in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from src.errors import UserError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS, BATCH_BYTES = 512, 64 << 20  # at most so many rows, or about so many bytes: a row may be a whole book
MOST_BYTES = 4 << 30  # of a row group without compression: of an ordinary file it has some hundred megabytes


def read_batches(
    path: str, columns: Callable[[pyarrow.Schema], list[str]], flag: str = ""
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """(rows, bytes of the file read up to their end) of the columns that `columns` chooses.

    UserError, about `flag`, without the package pyarrow, and for a file that can't be read or is too large to be.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "reading .parquet needs the package pyarrow", flag=flag, given=path, advice="pip install pyarrow"
        ) from error
    size = Path(path).stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = columns(file.schema_arrow)
            rows, done = max(1, file.metadata.num_rows), 0
            for i in range(file.num_row_groups):
                batch_rows = _batch_rows(file.metadata.row_group(i), i, names, path, flag)
                # None, since a name with a dot would be taken for a part of another column
                chosen = None if names == file.schema_arrow.names else names
                for batch in file.iter_batches(batch_size=batch_rows, row_groups=[i], columns=chosen):
                    done += len(batch)
                    # The bytes read are estimated from the rows: pyarrow doesn't expose a file position.
                    yield batch, size * done // rows
    except pyarrow.ArrowException as error:
        raise UserError(f"not a readable Parquet file ({error})", flag=flag, given=path) from error


def _batch_rows(group: pyarrow.parquet.RowGroupMetaData, number: int, names: list[str], path: str, flag: str) -> int:
    """The number of rows to read at once from a row group."""
    columns = (group.column(j) for j in range(group.num_columns))
    # "turns.list.element.text" is a part of the column "turns"
    parts = (c for c in columns if any(f"{c.path_in_schema}.".startswith(f"{name}.") for name in names))
    n_bytes = sum(part.total_uncompressed_size for part in parts)
    if n_bytes > MOST_BYTES:
        raise UserError(
            f"row group {number} has {n_bytes} bytes without compression",
            flag=flag,
            given=path,
            expected=f"at most {MOST_BYTES}",
            advice="write the file with smaller row groups (row_group_size of pyarrow)",
        )
    return max(1, min(BATCH_ROWS, group.num_rows * BATCH_BYTES // max(1, n_bytes)))
