"""One Arrow file of a run: taken up where a killed run left it, filled case by case, finished under a hidden name.

Beside the final ``NAME.arrow`` and ``NAME.manifest.json`` the output folder holds, while work is under way:

* ``.NAME.arrow.partial``, ``.NAME.arrow.journal.jsonl``: rows and records so far,
* ``.NAME.arrow.ready``, ``.NAME.manifest.json.ready``: finished, waiting for all files of the corpus,
* ``.NAME.arrow.lock``: held by the process that writes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from mg3d.atomic import sync_directory
from mg3d.errors import EnvironmentProblem
from mg3d.locks import FileLock
from prepro.arrow_writer import GrowingArrow, stored_rows
from prepro.journal import Journal
from prepro.manifest import manifest_name, read_head, write_manifest
from prepro.plan import Shard
from prepro.readers.base import Case, Exclusion

logger = logging.getLogger(__name__)


class ShardFiles:
    """The names one Arrow file goes by on its way.

    Args:
        folder: the output folder.
        name: the file's final name.
    """

    ENDINGS = (".partial", ".journal.jsonl", ".ready", ".lock", ".unsynced")

    def __init__(self, folder: Path, name: str) -> None:
        self.arrow, self.manifest = folder / name, folder / manifest_name(name)
        self.partial, self.journal = folder / f".{name}.partial", folder / f".{name}.journal.jsonl"
        self.ready, self.lock = folder / f".{name}.ready", folder / f".{name}.lock"
        self.manifest_ready = folder / f".{self.manifest.name}.ready"
        self.manifest_unsynced = folder / f".{self.manifest.name}.unsynced"

    def finished_head(self, shard: Shard, *, check_sources: bool) -> dict[str, Any] | None:
        """Return the manifest of a finished file, published or ready.

        Args:
            shard: what the file must hold.
            check_sources: also that no source file changed since.

        Returns:
            the manifest without its cases; None when the file is missing, incomplete or of another plan.
        """
        arrow = self.current_arrow
        head = read_head(self.current_manifest)
        if head is None or not arrow.is_file() or arrow.stat().st_size != head.get("bytes"):
            return None
        plan = head.get("plan")
        if not isinstance(plan, dict) or plan.get("content") != shard.content_digest:
            return None
        return None if check_sources and plan.get("sources") != shard.source_digest else head

    @property
    def current_arrow(self) -> Path:
        """The newest finished rows: ready ones, else the published ones."""
        return self.ready if self.ready.exists() else self.arrow

    @property
    def current_manifest(self) -> Path:
        """The manifest of :attr:`current_arrow`."""
        return self.manifest_ready if self.manifest_ready.exists() else self.manifest

    def is_unpublished(self) -> bool:
        """Whether something is ready that has not got its final name."""
        return self.ready.exists() or self.manifest_ready.exists()

    def publish(self) -> None:
        """Give ready files their final names; each moment in between is recognised by :meth:`finished_head`."""
        for ready, final in ((self.manifest_ready, self.manifest), (self.ready, self.arrow)):
            if ready.exists():
                os.replace(ready, final)

    def tidy(self) -> None:
        """Remove what a run left that died right after it had finished this file."""
        self.journal.unlink(missing_ok=True)
        if self.lock.exists():
            lock = FileLock(self.lock)
            if lock.acquire():
                lock.release()

    def discard(self) -> None:
        """Remove everything unpublished but the lock."""
        for path in (self.partial, self.journal, self.ready, self.manifest_ready, self.manifest_unsynced):
            path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one Arrow file; take it up with :meth:`open`, then give it every remaining case in order.

    Args:
        folder: the output folder.
        shard: what to write.
        schema: of the rows.
        compression: of the Arrow buffers.
    """

    def __init__(self, folder: Path, shard: Shard, schema: pa.Schema, compression: str | None) -> None:
        self.shard = shard
        self.files = ShardFiles(folder, shard.name)
        self.rows = self.done = self.warned = 0
        self.failures: list[Exclusion] = []
        self._schema, self._compression = schema, compression
        self._lock = FileLock(self.files.lock)
        self._journal = Journal(self.files.journal)
        self._rows_digest = hashlib.sha256()
        self._contents: dict[bytes, list[str]] = {}

    @property
    def remaining(self) -> Sequence[Case]:
        """Cases not processed yet."""
        return self.shard.cases[self.done :]

    def open(self) -> None:
        """Lock the file, then continue what a killed run left, or begin.

        Raises:
            EnvironmentProblem: another process writes it.
        """
        if not self._lock.acquire():
            message = f"{self.shard.name} is being written by {self._lock.owner()}"
            raise EnvironmentProblem(message, "wait for it, or choose another --out or --shard")
        self._lock.sign()
        header = {"content": self.shard.content_digest, "sources": self.shard.source_digest, "arrow": pa.__version__}
        found = self._journal.header()
        if found != header:
            if found is not None or self.files.ready.exists():
                logger.info("%s: settings or scans changed: starting over", self.shard.name)
            self.files.discard()
            self._journal.start(header)
        elif self.files.ready.exists() and not self.files.partial.exists():
            os.replace(self.files.ready, self.files.partial)  # killed before its manifest was there
        self._arrow = GrowingArrow(self.files.partial, self._schema, self._compression)
        self._replay()

    def _replay(self) -> None:
        stored = stored_rows(self.files.partial, self._schema)
        for case, entry in zip(self.shard.cases, self._journal.entries(), strict=False):
            if "failure" in entry:
                self._count_failure(Exclusion(**entry["failure"]))
                continue
            batch = next(stored, None)
            if batch is None or not _belongs(batch, entry["row"], case):
                break
            self._arrow.add(batch)
            self._count_row(entry["row"])
            if not self._arrow.replaying:
                break
        self._arrow.end_replay()
        self._journal.keep(self.done)
        if self.done:
            logger.info("%s: going on after %d of %d scans", self.shard.name, self.done, len(self.shard.cases))

    def add_row(self, batch: pa.RecordBatch, record: Mapping[str, Any]) -> None:
        """Append the row of the next case.

        Args:
            batch: one-row batch of the schema.
            record: what the manifest says of it.
        """
        self._arrow.add(batch)
        self._journal.append({"row": record})
        self._count_row(record)

    def add_failure(self, failure: Exclusion) -> None:
        """Record that the next case could not be used.

        Args:
            failure: which, and why.
        """
        self._journal.append({"failure": asdict(failure)})
        self._count_failure(failure)

    def _count_row(self, record: Mapping[str, Any]) -> None:
        self.rows += 1
        self.done += 1
        self.warned += bool(record["warnings"])
        line = f"{record['image_id']} {record['image_sha256']} {record['row_crc32']}\n"
        self._rows_digest.update(line.encode())
        self._contents.setdefault(bytes.fromhex(record["image_sha256"]), []).append(record["image_id"])

    def _count_failure(self, failure: Exclusion) -> None:
        self.done += 1
        self.failures.append(failure)

    def packed_cases(self) -> Iterator[Case]:
        """Yield the cases that have a row."""
        failed = {failure.image_id for failure in self.failures}
        return (case for case in self.shard.cases if case.image_id not in failed)

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the file and its manifest under their ready names.

        Args:
            more: further entries of the manifest.

        Returns:
            the manifest without its cases.
        """
        digest, size = self._arrow.finish()
        self._arrow.close()
        head = {
            **more,
            "split": self.shard.split,
            "file": self.shard.name,
            "rows": self.rows,
            "warned": self.warned,
            "bytes": size,
            "sha256": digest,
            "rows_sha256": self._rows_digest.hexdigest(),
            "plan": {"content": self.shard.content_digest, "sources": self.shard.source_digest},
            "exclusions": [asdict(failure) for failure in self.failures],
            "duplicates": [names for names in self._contents.values() if len(names) > 1],
        }
        rows = (entry["row"] for entry in self._journal.entries() if "row" in entry)
        write_manifest(self.files.manifest_unsynced, head, rows)
        os.replace(self.files.partial, self.files.ready)
        os.replace(self.files.manifest_unsynced, self.files.manifest_ready)
        sync_directory(self.files.ready.parent)
        self.files.journal.unlink(missing_ok=True)
        self.close()
        return head

    def close(self) -> None:
        """Let go of the files; what is not finished can be taken up again."""
        if hasattr(self, "_arrow"):
            self._arrow.close()
        self._lock.release()


def _belongs(batch: pa.RecordBatch, record: Mapping[str, Any], case: Case) -> bool:
    image_id, checksum = batch.column("image_id")[0].as_py(), batch.column("row_crc32")[0].as_py()
    return (image_id, checksum) == (record["image_id"], record["row_crc32"]) and image_id == case.image_id


def leftovers(folder: Path, corpus: str, names: Collection[str]) -> list[Path]:
    """List hidden files of earlier runs whose Arrow file is not planned any more.

    Args:
        folder: the output folder.
        corpus: dataset key.
        names: the Arrow files of this plan.

    Returns:
        the files, sorted.
    """
    endings = "|".join(re.escape(ending) for ending in ShardFiles.ENDINGS)
    pattern = re.compile(
        rf"\.({corpus}_(?:train|val|test)(?:-\d{{5}}-of-\d{{5}})?)\.(?:arrow|manifest\.json)(?:{endings})"
    )
    matches = ((path, pattern.fullmatch(path.name)) for path in folder.glob(f".{corpus}_*"))
    return sorted(path for path, match in matches if match and f"{match[1]}.arrow" not in names)
