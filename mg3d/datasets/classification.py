"""Labelled volumes of a classification benchmark: load, augment, fit to the network's size, stack to batches.

Axes: B batch, K outputs, D/H/W volume axes (z, y, x unless ``axis_order`` permutes them).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mg3d import __version__
from mg3d.datasets.array_cache import ArrayCache, digest_of, file_facts, function_facts
from mg3d.datasets.fitting import centred_start, cut_block
from mg3d.datasets.seeding import sample_generator
from mg3d.datasets.volume_report import BadSample, SampleIndex
from mg3d.errors import ConfigError, DataError, MG3DError

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, ClassificationTask
    from mg3d.finetuning.config import FinetuneConfig

MAX_REPLACEMENTS = 20
UNKNOWN_TARGET = -1.0
RANGE_TOLERANCE = 1e-3

Loader = Callable[["Case", "FinetuneConfig"], np.ndarray]


@dataclass(frozen=True)
class ClassificationSample:
    """One labelled volume.

    Attributes:
        image: float32 ``[1, D, H, W]`` in [0, 1].
        target: class index (multiclass), or float32 ``[K]`` of 0, 1 or -1 unknown (binary outputs).
        row: number of the case asked for.
        case: the case that came, another one when the one asked for cannot be read.
        bad: cases that were tried before this one.
    """

    image: Tensor
    target: Tensor
    row: int
    case: Case
    bad: tuple[BadSample, ...] = ()


class ClassificationDataset(torch.utils.data.Dataset):
    """Cases of one split as samples; every random choice depends on (seed, epoch, case id) alone.

    Args:
        cases: the cases.
        task: what is predicted and how images are read.
        cfg: the run's config: seed, axis order, ``cache``, ``on_bad_sample``.
        train: augment, and replace a case that cannot be read by one of the same target; else it is left out.

    Raises:
        ConfigError: the task's load function does not exist.
        DataError: a case has no usable target.
    """

    def __init__(self, cases: Sequence[Case], task: ClassificationTask, cfg: FinetuneConfig, *, train: bool) -> None:
        self.cases = tuple(cases)
        self.task = task
        self.cfg = cfg
        self.train = train
        self.load: Loader = resolve_loader(task.load)
        self.targets = [check_target(case, task) for case in self.cases]
        self.axes = tuple("zyx".index(axis) for axis in cfg.axis_order)
        self.size_dhw = tuple(task.size_dhw[axis] for axis in self.axes)
        self._memory: dict[int, np.ndarray] | None = {} if cfg.cache == "memory" else None
        self._disk = ArrayCache(f"{cfg.work_dir}/cache") if cfg.cache == "disk" else None
        self._recipe = _recipe(self.load, task, cfg)

    def __len__(self) -> int:
        return len(self.cases)

    def __repr__(self) -> str:
        size = "x".join(str(edge) for edge in self.size_dhw)
        return f"ClassificationDataset({len(self)} cases, input DHW {size})"

    def __getitem__(self, index: int | SampleIndex) -> ClassificationSample | BadSample:
        """Return a sample; with ``on_bad_sample=skip`` a marker where an unreadable case is not replaced.

        Raises:
            DataError: the case cannot be read and ``on_bad_sample=raise``, or none of its replacements can.
        """
        row, epoch = index if isinstance(index, tuple) else (index, 0)
        bad: list[BadSample] = []
        for candidate in self._candidates(row):
            try:
                image = self._image(candidate, epoch)
            except DataError as error:
                if self.cfg.on_bad_sample == "raise":
                    raise
                bad.append(BadSample(candidate, str(error)))
                continue
            return ClassificationSample(image, self._target(candidate), row, self.cases[candidate], tuple(bad))
        if self.train:
            message = f"{len(bad)} cases one after another cannot be read, the last: {bad[-1].reason}"
            raise DataError(message, "list everything that is wrong with --check-data")
        return bad[-1]

    def as_evaluated(self) -> ClassificationDataset:
        """The same cases without augmentation and replacement; caches are shared."""
        plain = copy.copy(self)
        plain.train = False
        return plain

    def array(self, row: int) -> np.ndarray:
        """Return the array of a case before any random change, float32 [D, H, W] in [0, 1] (do not write to it).

        Raises:
            DataError: naming the case.
        """
        if self._memory is None:
            return self._stored(row)
        if row not in self._memory:
            self._memory[row] = self._stored(row)
        return self._memory[row]

    def fingerprint(self) -> str:
        """Digest of what the evaluated images follow from: cases, files, load function and config."""
        files = {str(case.image): file_facts(case.image) for case in self.cases}  # several cases may share a file
        cases = [[case.id, str(case.image)] for case in self.cases]
        return digest_of({**self._recipe, "axis_order": self.cfg.axis_order, "cases": cases, "files": files})

    def keep(self, row: int, array: np.ndarray) -> None:
        """Put an array that another process has read into the memory cache."""
        if self._memory is not None:
            self._memory[row] = array

    def _stored(self, row: int) -> np.ndarray:
        case = self.cases[row]
        if self._disk is None:
            return read_case(self.load, case, self.cfg)
        key = digest_of({**self._recipe, "case": case.id, "image": file_facts(case.image)})
        return self._disk.get(key, lambda: read_case(self.load, case, self.cfg))

    def _image(self, row: int, epoch: int) -> Tensor:
        case, array = self.cases[row], self.array(row)
        if self.train and self.task.augment is not None:
            rng = sample_generator(self.cfg.seed, epoch, case_number(case.id), "transform")
            array = np.clip(self.task.augment(array.copy(), rng, self.cfg), 0.0, 1.0)
        fitted = fit_centre(array, self.task.size_dhw).transpose(self.axes)
        return torch.from_numpy(np.array(fitted, dtype=np.float32, order="C"))[None]

    def _target(self, row: int) -> Tensor:
        values = self.targets[row]
        return torch.tensor(int(values[0])) if self.task.kind == "multiclass" else torch.tensor(values)

    def _candidates(self, row: int) -> Iterator[int]:
        """The row asked for, then in training its replacements of the same target, fixed by (seed, row)."""
        yield row
        if self.train:
            same = self.targets[row]
            alike = [other for other, target in enumerate(self.targets) if other != row and target == same]
            order = sample_generator(self.cfg.seed, 0, row, "replacement").permutation(len(alike))
            yield from (alike[int(k)] for k in order[:MAX_REPLACEMENTS])


class ClassificationCollator:
    """Samples -> ``{"image": [B, 1, D, H, W], "target": [B] or [B, K], "id", "patient", "tags", "index"}``.

    Unreadable cases are listed under ``bad_samples``; a batch may be empty (B = 0).

    Args:
        size_dhw: voxels of an image, for batches without any.
        outputs: K for binary outputs, 0 for one class index.
    """

    def __init__(self, size_dhw: Sequence[int], outputs: int) -> None:
        self.size_dhw = tuple(size_dhw)
        self.outputs = outputs

    def __call__(self, items: Sequence[ClassificationSample | BadSample]) -> dict[str, Any]:
        """Stack what could be read."""
        good = [item for item in items if isinstance(item, ClassificationSample)]
        bad = [item for item in items if isinstance(item, BadSample)]
        return {
            "image": torch.stack([item.image for item in good]) if good else torch.zeros(0, 1, *self.size_dhw),
            "target": torch.stack([item.target for item in good]) if good else self._no_target(),
            "index": [item.row for item in good],
            "id": [item.case.id for item in good],
            "patient": [item.case.patient for item in good],
            "tags": [dict(item.case.tags) for item in good],
            "bad_samples": [entry for item in good for entry in item.bad] + bad,
        }

    def _no_target(self) -> Tensor:
        return torch.zeros(0, self.outputs) if self.outputs else torch.zeros(0, dtype=torch.int64)


def resolve_loader(load: str | Loader) -> Loader:
    """Return a task's load function, given itself or as ``"module:function"``.

    Raises:
        ConfigError: there is no such function.
    """
    if not isinstance(load, str):
        return load
    module, _, name = load.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"load={load!r}: {error}", "name it as module:function") from error


def refuse_unlabelled(cases: Sequence[Case]) -> None:
    """Refuse training cases of which none has a known value.

    Raises:
        DataError: there is nothing to learn.
    """
    if cases and all(value not in (0.0, 1.0) for case in cases for value in case.targets):
        raise DataError("no training case has a label", "complete the label tables: --check-data names them")


def read_case(load: Loader, case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Read one case with the task's function and check what comes back.

    Returns:
        float32 [D, H, W] in [0, 1].

    Raises:
        DataError: it cannot be read, or is no finite volume in [0, 1]; the message names case and file.
    """
    try:
        array = np.asarray(load(case, cfg))
    except MemoryError:
        raise
    except MG3DError as error:
        if getattr(error, "case_id", ""):
            raise
        told = error.message.removeprefix(f"{case.image}: ")
        raise DataError(told, error.remedy, case_id=case.id, path=str(case.image)) from error
    except Exception as error:  # file readers raise all kinds of errors on damaged files
        raise _unreadable(case, f"{type(error).__name__}: {error}") from error
    problem = _problem_of(array)
    if problem:
        raise _unreadable(case, problem)
    return np.ascontiguousarray(array, dtype=np.float32)


def check_target(case: Case, task: ClassificationTask) -> tuple[float, ...]:
    """Return the targets of a case as numbers; unknown binary outputs (NaN, or any other value) become -1.

    Raises:
        DataError: a missing target, or a class index that does not exist.
    """
    values = tuple(float(value) for value in case.targets)
    wanted = 1 if task.kind == "multiclass" else len(task.outputs)
    if len(values) != wanted:
        raise DataError(f"{len(values)} targets, expected {wanted}", "mend the label table", case_id=case.id)
    if task.kind != "multiclass":
        return tuple(value if value in (0.0, 1.0) else UNKNOWN_TARGET for value in values)
    if values[0] not in range(len(task.outputs)):
        raise DataError(
            f"class {values[0]:g} is none of 0 to {len(task.outputs) - 1}", "mend the label table", case_id=case.id
        )
    return values


def fit_centre(array_DHW: np.ndarray, size_dhw: Sequence[int]) -> np.ndarray:
    """Cut out the centre, and fill up with 0 (air) on both sides, until the array has the wanted size.

    An odd voxel too many is cut at the end; an odd voxel too few is added at the start.
    """
    if array_DHW.shape == tuple(size_dhw):
        return array_DHW
    starts = [centred_start(length, size) for length, size in zip(array_DHW.shape, size_dhw, strict=True)]
    return cut_block(array_DHW, starts, size_dhw, fill=0.0)


def case_number(case_id: str) -> int:
    """A number that stands for a case in random seeds, whatever its place in a list."""
    return int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:6], "big")


def _recipe(load: Loader, task: ClassificationTask, cfg: FinetuneConfig) -> Mapping[str, Any]:
    """All that decides how a case is read, apart from the case itself."""
    return {
        **function_facts(load),
        "size": task.size_dhw,
        "protocol": cfg.protocol,
        "roi": cfg.roi,
        "extra": dict(cfg.extra),
        "mg3d": __version__,
    }


def _unreadable(case: Case, problem: str) -> DataError:
    return DataError(
        problem, "mend or download the file again, or go on without it: on_bad_sample=skip", case_id=case.id,
        path=str(case.image),
    )  # fmt: skip


def _problem_of(array: np.ndarray) -> str:
    if array.ndim != 3 or array.size == 0:
        return f"the image has shape {array.shape}, expected [D, H, W]"
    if not np.issubdtype(array.dtype, np.floating):
        return f"the image is {array.dtype}, expected floating-point values in [0, 1]"
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "the image holds NaN or infinity"
    if low < -RANGE_TOLERANCE or high > 1.0 + RANGE_TOLERANCE:
        return f"the image has values from {low:g} to {high:g}, expected [0, 1]"
    return ""
