"""The one writer: cases in, Arrow files with manifests out, whatever interrupts it.

Rows keep the order of the cases whatever reads the scans, so the same cases give the same bytes for any number of
workers, for one process or several that share the files, and for a run that was killed and started again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.errors import DataError, EnvironmentProblem
from mg3d.locks import FileLock
from mg3d.scans.geometry import Geometry
from prepro.disk import check_free_space, estimated_row_bytes, explained, make_folder, needed_bytes
from prepro.engines import Engine, Failure, LocalEngine, load_in_order
from prepro.manifest import code_version
from prepro.plan import Plan, Shard, make_plan
from prepro.progress import Progress
from prepro.publish import DataSet, publish, refuse_competitors
from prepro.readers.base import Case, Exclusion, PackedImage, Reader
from prepro.shard_writer import ShardFiles, ShardWriter, leftovers
from prepro.splits import SPLITS
from prepro.text import FRAGMENT_RULES
from prepro.text_statistics import MAX_TEXT_LEN, TextStatistics
from prepro.tokens import TokenCounter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackOptions:
    """How a run packs.

    Attributes:
        out: folder of the arrows and manifests.
        geometry: the grid of every row.
        engine: where scans are read.
        rows_per_shard: rows per Arrow file; 0 writes one file per split.
        shard: (i, n): write the i-th of n parts of the files, counted from 1; None writes all.
        on_bad: ``skip`` counts and lists scans that cannot be used, ``stop`` ends the run at the first.
        clean: refuse equal volumes in two splits instead of reporting them.
        caption_separator: text between findings and impression in the caption.
        fragments: how sections are cut, a key of :data:`prepro.text.FRAGMENT_RULES`.
        counter: counts the tokens of reports; None gives a lower bound.
        max_text_len: tokens a model reads of a report.
        row_config: further settings that change what rows hold.
        about: further entries of the data-set manifest.
    """

    out: Path
    geometry: Geometry
    engine: Engine = field(default_factory=LocalEngine)
    rows_per_shard: int = 0
    shard: tuple[int, int] | None = None
    on_bad: str = "skip"
    clean: bool = True
    caption_separator: str = " "
    fragments: str = "comma"
    counter: TokenCounter | None = None
    max_text_len: int = MAX_TEXT_LEN
    row_config: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, window: str) -> dict[str, Any]:
        """Everything that changes what rows hold, for manifests and digests.

        Args:
            window: intensity window of the voxels, as the reader says.
        """
        own = {"caption_separator": self.caption_separator, "fragments": self.fragments, "window_hu": window}
        return {**self.row_config, **own, "geometry": self.geometry.metadata()}


@dataclass
class PackSummary:
    """What a run wrote, or found written.

    Attributes:
        rows: rows per split.
        failed: scans that could not be used.
        warned: packed scans with a warning in the manifest.
        text: text statistics per split; empty until the corpus is published.
        digests: sha256 per Arrow file.
        missing: files of the corpus that no process has finished yet; nothing is published before.
    """

    rows: dict[str, int]
    failed: int
    warned: int
    text: dict[str, Any]
    digests: dict[str, str]
    missing: list[str]


def pack(reader: Reader, cases: Sequence[Case], exclusions: Sequence[Exclusion], options: PackOptions) -> PackSummary:
    """Write this process's part of a corpus; publish the corpus when no part is missing.

    Args:
        reader: loads the voxels of a case.
        cases: cases with splits, in the order of the rows.
        exclusions: what was left out already, for the manifest.
        options: how to pack.

    Returns:
        counts and digests of this part.

    Raises:
        DataError: an unusable scan under ``stop``, equal volumes in two splits under ``clean``, or nothing to write.
        EnvironmentProblem: the disk cannot hold the result, or another process writes the same files.
        RunFailedError: the disk or the engine failed on the way.
    """
    plan = make_plan(cases, reader.corpus, options.settings(reader.window), options.rows_per_shard)
    part = plan.part(options.shard)
    make_folder(options.out)
    lock = FileLock(options.out / f".{plan.corpus}.run.lock")
    try:
        _enter(lock, options.out, plan)
        run = _Run(reader, plan, part, options)
        with explained(options.out, run.needed):
            run.write()
            config = {**options.about.get("config", {}), **options.settings(reader.window)}
            data_set = DataSet(tuple(exclusions), options.clean, {**options.about, "config": config})
            published = publish(options.out, plan, data_set, {split: run.statistics() for split in SPLITS})
        return run.summary(published)
    finally:
        lock.release()


def _enter(lock: FileLock, folder: Path, plan: Plan) -> None:
    """Join the processes that work on one plan; the first one tidies up after dead runs of other plans."""
    if not lock.acquire():
        lock.acquire(shared=True, wait=True)
        if lock.text() not in ("", plan.digest):
            message = f"{lock.owner()} is packing {plan.corpus} into {folder} with other settings or scans"
            raise EnvironmentProblem(message, "wait for it, or choose another --out")
        return
    refuse_competitors(folder, plan)
    lock.sign(plan.digest)
    stale = leftovers(folder, plan.corpus, {shard.name for shard in plan.shards}) if lock.certain else []
    for path in stale:
        path.unlink()
    if stale:
        logger.info("removed %d leftover files of unfinished runs with other settings", len(stale))
    lock.share()


class _Run:
    """The files of one process."""

    def __init__(self, reader: Reader, plan: Plan, part: Sequence[Shard], options: PackOptions) -> None:
        self._reader, self._corpus, self._options = reader, plan.corpus, options
        self._schema = make_schema(
            geometry=options.geometry.metadata(), window_hu=reader.window, label_names=list(reader.label_names)
        )
        self._heads = {
            shard: ShardFiles(options.out, shard.name).finished_head(shard, check_sources=True) for shard in part
        }
        self._todo = [shard for shard, head in self._heads.items() if head is None]
        row_bytes = estimated_row_bytes(options.geometry, reader.window)
        self.needed = needed_bytes(options.out, self._todo, row_bytes)
        check_free_space(options.out, self.needed)
        self._open: deque[ShardWriter] = deque()

    def statistics(self) -> TextStatistics:
        """Return empty text statistics."""
        return TextStatistics(self._options.counter, self._options.max_text_len, self._options.fragments)

    def write(self) -> None:
        """Write every file that is not finished."""
        for shard, head in self._heads.items():
            if head is not None:
                self._refuse_failures(shard.name, head["exclusions"])
        finished = sum(len(shard.cases) for shard in self._heads if shard not in self._todo)
        self._progress = Progress(finished + sum(len(shard.cases) for shard in self._todo), self._corpus)
        self._progress.skip(finished)
        try:
            with closing(load_in_order(self._reader, self._pending(), self._options.engine)) as results:  # type: ignore[type-var]
                for case, result in results:
                    self._finish_complete()
                    self._take(case, result)
            self._finish_complete()
        finally:
            self._progress.close()
            for writer in self._open:
                writer.close()

    def _pending(self) -> Iterator[Case]:
        for shard in self._todo:
            compression = "zstd" if self._options.geometry.store == "native" else None
            writer = ShardWriter(self._options.out, shard, self._schema, compression)
            self._open.append(writer)
            writer.open()
            self._refuse_failures(shard.name, [vars(failure) for failure in writer.failures])
            self._progress.skip(writer.done)
            yield from writer.remaining

    def _refuse_failures(self, name: str, failures: Sequence[Mapping[str, Any]]) -> None:
        if self._options.on_bad == "stop" and failures:
            first = failures[0]
            remedy = f"mend or exclude it; {name} was begun without it under --on-bad skip"
            raise DataError(first["reason"], remedy, case_id=first["image_id"], path=first["path"])

    def _take(self, case: Case, result: PackedImage | Failure) -> None:
        writer = self._open[0]
        if isinstance(result, Failure):
            if self._options.on_bad == "stop":
                raise DataError(result.message, result.remedy, case_id=case.image_id, path=result.path)
            writer.add_failure(Exclusion(case.image_id, result.path, result.message))
            logger.warning("%s left out: %s", case.image_id, result.message)
        else:
            batch = self._row(case, writer.shard.split, result)
            writer.add_row(batch, _record(case, result, batch))
        self._progress.step(failed=isinstance(result, Failure))

    def _finish_complete(self) -> None:
        while self._open and not self._open[0].remaining:
            writer = self._open[0]
            config = self._options.settings(self._reader.window)
            self._heads[writer.shard] = writer.finish(
                {"corpus": self._corpus, "code": code_version(), "config": config}
            )
            self._open.popleft()

    def _row(self, case: Case, split: str, packed: PackedImage) -> pa.RecordBatch:
        cut = FRAGMENT_RULES[self._options.fragments]
        return make_row_batch(
            self._schema,
            image=packed.voxels,
            image_id=case.image_id,
            patient_id=case.patient_id,
            corpus=self._corpus,
            split=split,
            findings=case.findings,
            impression=case.impression,
            findings_sen=cut(case.findings),
            impression_sen=cut(case.impression),
            spacing_mm=packed.spacing_mm,
            labels=case.labels,
            caption=self._options.caption_separator.join(text for text in (case.findings, case.impression) if text),
        )

    def summary(self, published: dict[str, Any] | list[str]) -> PackSummary:
        """Return what this part holds.

        Args:
            published: from :func:`prepro.publish.publish`.
        """
        heads = {shard: head for shard, head in self._heads.items() if head is not None}
        rows = dict.fromkeys(SPLITS, 0)
        for shard, head in heads.items():
            rows[shard.split] += head["rows"]
        return PackSummary(
            rows=rows,
            failed=sum(len(head["exclusions"]) for head in heads.values()),
            warned=sum(head["warned"] for head in heads.values()),
            text={} if isinstance(published, list) else published["text"],
            digests={shard.name: head["sha256"] for shard, head in heads.items()},
            missing=published if isinstance(published, list) else [],
        )


def _record(case: Case, packed: PackedImage, batch: pa.RecordBatch) -> dict[str, Any]:
    return {
        "image_id": case.image_id,
        "patient_id": case.patient_id,
        "image_sha256": hashlib.sha256(np.ascontiguousarray(packed.voxels).data).hexdigest(),
        "row_crc32": batch.column("row_crc32")[0].as_py(),
        **packed.record,
        "warnings": list(packed.warnings),
    }
