"""One run: skip what is there, encode a few volumes at a time, write a part now and then, join the parts."""

from __future__ import annotations

import resource
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mg3d import __version__
from mg3d.errors import DataError
from mg3d.inference.model import MG3DModel
from mg3d.inference.processor import Processor, make_processor
from mg3d.inference.volumes import pool_crops
from mg3d.training.run_folder import write_json
from prepro.progress import Progress
from tools.embedding.sources import PackedSource, Prepared, Refused, ScanSource, Source, is_packed
from tools.embedding.table import ABOUT, OVERWRITE, Table, make_schema
from tools.weights_options import open_model, open_processor

FORMAT_VERSION = 1
SCANS_PER_PART = 64
SECONDS_PER_PART = 60.0


def embed(options: Namespace) -> dict[str, Any]:
    """Do what the command line says.

    Args:
        options: parsed arguments of ``tools/embed.py``.

    Returns:
        What the last line of standard output shows.

    Raises:
        MG3DError: bad input; the only scan cannot be used.
    """
    model = open_model(options)
    output = options.output or ("embedding" if model.has_shared_space else "pooled")
    source, settings = _source(options, model, output)
    run = _Run(model, output, _table(options, model, output, settings), options.batch_size)
    if options.overwrite:
        run.table.clear()
    started = time.monotonic()
    done, names = run.table.done(), source.places
    before = _already_there(done, names)
    failures = run.over(source, done, Progress(len(names), "embed", "scan"), before)
    write_json(_failures_path(options.out), {"failures": [vars(entry) for entry in failures]})
    if len(names) == 1 and failures and not before:
        run.table.clear()
        raise DataError(failures[0].message, failures[0].remedy)
    if not run.rows and not done:
        raise DataError(f"none of {len(names)} scans can be used, first: {failures[0].message}", failures[0].remedy)
    seconds = time.monotonic() - started
    return {
        "embedded": run.rows,
        "already_there": before,
        "failed": len(failures),
        **(source.passed_over.counts() if isinstance(source, ScanSource) else {}),
        "rows": run.table.finish(),
        "volumes": run.volumes,
        "output": output,
        "width": run.width,
        "seconds": round(seconds, 2),
        "scans_per_second": round(run.rows / seconds, 3) if run.rows else None,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "out": str(options.out),
        "failures": str(_failures_path(options.out)),
    }


def _already_there(done: Mapping[str, str], places: Mapping[str, str]) -> int:
    """Scans that are in the table; refuses a name that stands for another scan there."""
    same = [name for name in places if name in done]
    for name in same:
        if Path(done[name]).resolve() != Path(places[name]).resolve():
            raise DataError(f"the table holds another {name}, from {done[name]}", OVERWRITE, path=places[name])
    return len(same)


def _failures_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.failures.json")


def _source(options: Namespace, model: MG3DModel, output: str) -> tuple[Source, dict[str, Any]]:
    """What to embed, and the settings that decide about the numbers."""
    if is_packed(options.path):
        if options.mode == "crops":
            raise DataError("packed rows are crops already", "leave out --mode crops", path=str(options.path))
        tokenizer = model.tokenizer if output == "embedding" else None
        size = make_processor(model.preparation, window_hu=(-1000, 1000)).size_dhw
        reports = model.metadata.get("reports") or {}
        packed = PackedSource(options.path, options.split, size, model.metadata, tokenizer)
        return packed, {"preparation": {"size_dhw": list(size), "reports": reports}, "mode": "packed rows"}
    processor = _processor(options, model)
    scans = ScanSource(options.path, processor, options.mode, options.workers, options.follow_links)
    for line in scans.passed_over.lines():
        sys.stderr.write(f"{line}\n")
    return scans, {"preparation": processor.describe(), "mode": options.mode}


def _processor(options: Namespace, model: MG3DModel) -> Processor:
    processor = open_processor(options, model)
    return replace(processor, crop_spacing_mm=tuple(options.crop_spacing) if options.crop_spacing else None)


def _table(options: Namespace, model: MG3DModel, output: str, settings: dict[str, Any]) -> Table:
    width = model.embedding_width if output == "embedding" else model.vision_encoder.out_channels
    config = {
        "format_version": FORMAT_VERSION,
        "weights": model.digest,
        "vision_encoder": model.metadata["vision_encoder"],
        "output": output,
        **settings,
        ABOUT: {"weights": Path(model.name).name, "mg3d_version": __version__},
    }
    with_text = output == "embedding" and settings["mode"] == "packed rows"
    return Table(options.out, make_schema(output, width, with_text, config))


class _Run:
    """Encodes scans and writes them.

    Args:
        model: the weights.
        output: column of features.
        table: files to write.
        batch_size: volumes that are encoded together.
    """

    def __init__(self, model: MG3DModel, output: str, table: Table, batch_size: int) -> None:
        self.model, self.output, self.table, self.batch_size = model, output, table, batch_size
        self.rows = self.volumes = 0
        self.width = self._width()
        self._unwritten: list[dict[str, Any]] = []
        self._written = time.monotonic()

    def _width(self) -> int:
        kind = self.table.schema.field(self.output).type
        return int(kind.value_type.list_size if self.output == "tokens" else kind.list_size)

    def over(self, source: Source, done: Collection[str], progress: Progress, before: int) -> list[Refused]:
        """Encode everything that is not done; returns what could not be used."""
        failures: list[Refused] = []
        progress.skip(before)
        waiting: list[Prepared] = []
        try:
            with closing(_as_generator(source, done)) as scans:
                for scan in scans:
                    if isinstance(scan, Refused):
                        failures.append(scan)
                        progress.step(failed=True)
                        continue
                    waiting.append(scan)
                    if sum(len(each.volumes) for each in waiting) >= self.batch_size:
                        self._encode(waiting, progress)
                        waiting = []
            self._encode(waiting, progress)
        finally:
            self._write()
            progress.close()
        return failures

    def _encode(self, scans: list[Prepared], progress: Progress) -> None:
        if not scans:
            return
        volumes = np.concatenate([scan.volumes for scan in scans])
        found = self.model.vectors(volumes, self.output, self.batch_size)
        texts = self._texts(scans)
        first = 0
        for number, scan in enumerate(scans):
            part = pool_crops(found[first : first + len(scan.volumes)], self.output)[0]
            first += len(scan.volumes)
            row = {"id": scan.name, **scan.columns, "volumes": len(scan.volumes), self.output: _plain(part)}
            self._unwritten.append(row if texts is None else {**row, "text_embedding": texts[number]})
            progress.step()
        self.rows += len(scans)
        self.volumes += len(volumes)
        if len(self._unwritten) >= SCANS_PER_PART or time.monotonic() - self._written > SECONDS_PER_PART:
            self._write()

    def _texts(self, scans: list[Prepared]) -> list[np.ndarray] | None:
        if "text_embedding" not in self.table.schema.names:
            return None
        return list(self.model.encode_reports([scan.report for scan in scans]).numpy())

    def _write(self) -> None:
        if self._unwritten:
            self.table.add(self._unwritten)
        self._unwritten, self._written = [], time.monotonic()


def _plain(features: torch.Tensor) -> Any:
    return list(features.numpy()) if features.dim() > 1 else features.numpy()


def _as_generator(source: Source, done: Collection[str]) -> Iterator[Prepared | Refused]:
    yield from source.prepare(done)
