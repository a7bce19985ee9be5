"""Raw documents in a fixed number of shards, each of which can be read from any document on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from fsspec.asyn import reset_lock  # type: ignore[import-untyped]
from torch.utils.data import get_worker_info


class DocumentShards:
    """Shards of documents that depend on the data alone, not on how many processes or workers read them.

    The sources are files, or row groups of parquet files where there are fewer files than shards asked for, or the
    shards of a data set on the Hub. Where there are still fewer, each source is divided into parts by the number of its
    documents: part ``p`` of ``n`` has the documents ``p``, ``p + n``, and so on; whoever reads it passes over the rest.

    Args:
        documents: Column ``text``, one document a row.
        shards: Number of shards at least. Those of the data are never put together.
        files: The local files behind ``documents``, for checks and messages.
        is_one: Take ``documents`` for one source, as it must be where only the first documents are taken.

    Raises:
        ValueError: If ``shards`` is below 1.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        *,
        shards: int = 1,
        files: Sequence[Path] = (),
        is_one: bool = False,
    ) -> None:
        if shards < 1:
            raise ValueError(f"stream_shards must be at least 1, got {shards}")
        if not is_one and documents.num_shards < shards:
            documents = documents.reshard()
        self.documents, self.paths = documents, [str(path) for path in files]
        self.sources = 1 if is_one else documents.num_shards
        self.parts = -(-shards // self.sources)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return self.sources * self.parts

    def texts(self, shard: int, *, epoch: int = 0, start: int = 0) -> Iterator[str | None]:
        """Read a shard.

        Args:
            shard: Its number.
            epoch: Shuffles documents that are shuffled.
            start: Number of the first document to read.

        Raises:
            RuntimeError: If the data cannot be read; names the file.
        """
        source, part = divmod(shard, self.parts)
        rows = self.documents if self.sources == 1 else self.documents.shard(self.sources, source)
        rows = rows.skip(start * self.parts + part)
        rows.set_epoch(epoch)
        if get_worker_info() is not None:
            reset_lock()  # a forked worker would wait for the lock of its parent
        try:
            # Other than iter(rows), this does not divide the documents among the workers of torch's data loader.
            for row in islice(rows.iter(batch_size=1), 0, None, self.parts):
                yield row["text"][0]
        except Exception as error:
            raise RuntimeError(f"cannot read {self._culprit(source)}: {error}") from error

    def files(self) -> dict[str, int]:
        """The local files with their sizes in bytes.

        Raises:
            OSError: If one cannot be opened.
        """
        sizes = {}
        for path in self.paths:
            with open(path, "rb") as file:
                sizes[path] = os.fstat(file.fileno()).st_size
        return sizes

    def identity(self) -> dict[str, Any]:
        """How the documents are divided, fit for JSON."""
        return {"num_shards": self.num_shards, "parts": self.parts}

    def _culprit(self, source: int) -> str:
        if gone := [path for path in self.paths if not os.access(path, os.R_OK)]:
            return ", ".join(gone)
        return self.paths[source] if len(self.paths) == self.sources else f"shard {source} of {self.sources}"
