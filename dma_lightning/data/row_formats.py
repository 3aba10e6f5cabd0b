"""Documents in rows of tables: parquet files, and folders that the library datasets saved."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dma_lightning.data.find_files import size_and_time
from dma_lightning.tokenizers import library_errors

_ROWS = 256  # rows that are read at once


class Row(NamedTuple):
    """A document in a row.

    Attributes:
        number: number of the row, from 1.
        text: text of the document, in UTF-8.
        read: number of bytes of the file read so far, assuming that all rows have the same size.
    """

    number: int
    text: bytes
    read: int


def parquet_rows(path: Path, text_field: str, skip: int) -> Iterator[Row]:
    """The documents of a parquet file.

    Args:
        path: path of the file.
        text_field: the column that holds the text.
        skip: number of rows to skip.

    Raises:
        ValueError: if the file is damaged or has no text in such a column, or if pyarrow is missing.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: expected the library pyarrow for .parquet files; pip install pyarrow") from error
    what = f"{path}: expected a whole .parquet file"
    with path.open("rb") as raw:
        with library_errors(what):
            file = parquet.ParquetFile(raw)
            metadata, schema = file.metadata, file.schema_arrow
        _check_column(path, schema, text_field)
        groups, before = _row_groups(metadata, skip)
        with library_errors(what):
            batches = file.iter_batches(_ROWS, row_groups=groups, columns=[text_field])
        columns = (batch.column(0) for batch in _each(batches, what))
        yield from _documents(path, columns, metadata.num_rows, before, skip)


def dataset_rows(folder: Path, text_field: str, skip: int) -> Iterator[Row]:
    """The documents of a folder that `Dataset.save_to_disk` wrote; arguments and errors as in `parquet_rows`."""
    size_and_time(folder)  # checks that its files are in the folder
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{folder}: expected the library datasets for what `Dataset.save_to_disk` wrote; pip install datasets"
        ) from error
    what = f"{folder}: expected what `Dataset.save_to_disk` wrote"
    with library_errors(what):
        data = datasets.load_from_disk(str(folder.resolve()), keep_in_memory=False)
        schema, count = data.data.schema, len(data)
    _check_column(folder, schema, text_field)
    if skip >= count:
        return
    with library_errors(what):
        texts = data.select_columns([text_field]).with_format("arrow").select(range(skip, count))
    columns = (table.column(0) for table in _each(texts.iter(_ROWS), what))
    yield from _documents(folder, columns, count, skip, skip)


def _row_groups(metadata: Any, skip: int) -> tuple[list[int], int]:
    """The groups of a parquet file that hold rows after those to skip, and how many rows come before these groups."""
    end, groups, before = 0, [], 0
    for group in range(metadata.num_row_groups):
        end += metadata.row_group(group).num_rows
        if end > skip:
            groups.append(group)
        else:
            before = end
    return groups, before


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    """Check that a table has a column of text.

    Raises:
        ValueError: if it has none.
    """
    index = schema.get_field_index(text_field)  # -1 also if there are several
    if index < 0 or not _is_text(schema.field(index).type):
        found = {field.name: str(field.type) for field in schema}
        raise ValueError(
            f"{path}: expected a column {text_field!r} of strings, got the columns {found}; name another with "
            "--text_field"
        )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _documents(path: Path, columns: Iterable[Any], count: int, before: int, skip: int) -> Iterator[Row]:
    """The documents in the rows of a column.

    Args:
        path: path of the file.
        columns: parts of the column of text, in order.
        count: number of all rows.
        before: number of rows before the first one in `columns`.
        skip: number of rows to skip, including those `before`.

    Raises:
        ValueError: if a row has no text, or text that is not UTF-8.
    """
    import pyarrow

    size, _ = size_and_time(path)
    number = before
    for column in columns:
        with library_errors(f"{path}, row {number + 1} or after: expected text"):
            texts = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
        for text in texts:
            number += 1
            if number > skip:
                yield Row(number, _checked(path, number, text), size * number // count)


def _checked(path: Path, number: int, text: bytes | None) -> bytes:
    """The text of a row.

    Raises:
        ValueError: if there is none, or it is not UTF-8.
    """
    if text is None:
        raise ValueError(f"{path}, row {number}: expected a string, got null")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {number}: expected UTF-8: {error.reason} {text[error.start]:#x}") from error
    return text


def _each(items: Iterable[Any], what: str) -> Iterator[Any]:
    """Items of a library, whose errors begin with `what`."""
    iterator = iter(items)
    while True:
        with library_errors(what):
            item = next(iterator, None)
        if item is None:
            return
        yield item
