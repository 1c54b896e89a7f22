"""Arrow tables as the bytes of a Parquet file, for places that take whole files."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq


def to_bytes(table: pa.Table) -> bytes:
    """Return the Parquet file of a table."""
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def from_bytes(content: bytes) -> pa.Table:
    """Return the table of a Parquet file.

    Raises:
        ArrowException: it is none.
    """
    # Without threads: Arrow aborts a process that ends while its pool is still starting.
    return pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)
