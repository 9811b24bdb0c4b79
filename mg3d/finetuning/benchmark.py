"""What a benchmark says about itself: its cases, its task and the functions that read its data. No heavy import.

A folder under ``downstream/`` fills in one `Benchmark`; `mg3d.finetuning.experiment.run_benchmark` does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mg3d.datasets.report_vocabulary import ReportVocabulary
    from mg3d.finetuning.config import FinetuneConfig

__all__ = [
    "AugmentationOptions",
    "Benchmark",
    "Case",
    "ClassificationTask",
    "FinetuneData",
    "FinetuneModule",
    "ReportTask",
    "SegmentationTask",
    "Splits",
    "Task",
    "VocabularyTask",
]


@dataclass(frozen=True)
class Case:
    """One image with its label.

    Attributes:
        id: stable and unique name; first column of ``per_case.csv``.
        patient: unit of the splits and of the bootstrap.
        image: file of the image (NIfTI, MetaImage, ``.npy`` ...).
        label: segmentation: file of the label map.
        targets: classification: the class index (one value), or one 0/1 for each binary output.
        stratum: group that splits keep in proportion (class, disease group); empty for none.
        tags: sub-groups that are also reported alone, for example ``{"phase": "ED"}``.
    """

    id: str
    patient: str
    image: Path
    label: Path | None = None
    targets: tuple[float, ...] = ()
    stratum: str = ""
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Splits:
    """Cases by use: fitted on train, selected on val, reported on test.

    Attributes:
        train: cases whose labels are fitted.
        val: cases that choose the best epoch.
        test: cases that are reported; equal to ``val`` only with ``protocol=reference``.
        notes: remarks that are printed and written to ``metrics.json``, e.g. ``"selection = reporting"``.
    """

    train: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of a training crop; every probability 0 is off. Axes are those of the image array.

    Attributes:
        flip_p: probability of a flip along each axis.
        rot90_p: probability of a quarter turn in the plane of the first two axes.
        rot90_max: most quarter turns.
        affine_p: probability of an affine change.
        affine_rotate_rad: largest rotation about each axis, in radians.
        affine_scale: largest relative change of size along each axis.
        affine_translate_voxels: largest shift along each axis, in voxels.
        noise_p: probability of Gaussian noise.
        noise_std: its standard deviation, in image units.
        zoom_p: probability of a zoom.
        zoom_range: smallest and largest factor.
        intensity_scale_p: probability of a change of contrast.
        intensity_scale: largest relative change.
        intensity_shift_p: probability of a change of brightness.
        intensity_shift: largest shift, in image units.
    """

    flip_p: float = 0.0
    rot90_p: float = 0.0
    rot90_max: int = 3
    affine_p: float = 0.0
    affine_rotate_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    affine_scale: tuple[float, float, float] = (0.0, 0.0, 0.0)
    affine_translate_voxels: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise_p: float = 0.0
    noise_std: float = 0.0
    zoom_p: float = 0.0
    zoom_range: tuple[float, float] = (1.0, 1.0)
    intensity_scale_p: float = 0.0
    intensity_scale: float = 0.0
    intensity_shift_p: float = 0.0
    intensity_shift: float = 0.0


@dataclass(frozen=True)
class SegmentationTask:
    """A label map for every image.

    Attributes:
        classes: names of the foreground classes; label k + 1 is ``classes[k]``.
        label_map: raw label -> class index (0 background), fixed: it never depends on what a case happens to hold.
        orientation: axis codes of the working grid, "RAS" or "LPS".
        spacing_mm: (x, y, z) of the working grid; None keeps the image's own.
        window: lower and upper value mapped to [0, 1], clipped; None: z-score over the non-zero voxels.
        roi: voxels of a training crop and of the sliding window, in the order of the image axes.
        foreground_crop: "none", "raw" (image > 0) or "reference_zscore" (z-scored image > 0).
        augmentation: random changes of training crops.
        crops_per_volume: crops of one volume in a step.
        positive: weight of crops centred on foreground.
        negative: weight of crops centred on background.
        loss: "dice_ce", "dice_squared_ce" or "dice".
        overlap: overlap of neighbouring windows, in [0, 1).
        blending: weight of voxels inside a window, "constant" or "gaussian".
        tolerances_mm: tolerances of the normalised surface Dice.
    """

    classes: tuple[str, ...]
    label_map: Mapping[int, int]
    orientation: str = "RAS"
    spacing_mm: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    roi: tuple[int, int, int] = (96, 96, 96)
    foreground_crop: str = "none"
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    crops_per_volume: int = 2
    positive: float = 1.0
    negative: float = 1.0
    loss: str = "dice_ce"
    overlap: float = 0.5
    blending: str = "constant"
    tolerances_mm: tuple[float, ...] = (2.0,)


@dataclass(frozen=True)
class ClassificationTask:
    """One or several answers for every image.

    Attributes:
        outputs: class names (softmax), or names of the independent binary outputs (sigmoid).
        kind: "multiclass" or "binary".
        size_dhw: voxels (z, y, x) that the network sees; `FinetuneConfig.axis_order` may permute them.
        load: ``"module:function"`` or a top-level function (case, cfg) -> float32 array [D, H, W] in [0, 1]. It runs in
            loader workers, so it must be picklable.
        augment: (array, generator, cfg) -> array of the same shape; None for none.
        head: "linear", "norm_linear", "mlp_linear" or "decoder_gap".
        balance: "none", or "class": equal class counts each epoch, negatives drawn anew with the epoch.
        metrics: further figures of (ids, probabilities [n, K], targets [n, K]) -> name -> value.
        entries: further figures that bring their own intervals: (ids, probabilities, targets, rounds, seed) -> name ->
            ``{"mean", "ci95", "n"}``; with 0 rounds no interval. For what does not stand cases that are drawn twice.
        monitor: what chooses the best epoch: "auroc" (mean over the outputs), "accuracy", "macro_f1", a name of
            `metrics`, or "auto": auroc for binary outputs, accuracy for classes.
        class_weights: weight of each class in the loss (multiclass), or of the positive cases of each binary output;
            empty: all equal.
    """

    outputs: tuple[str, ...]
    kind: str = "multiclass"
    size_dhw: tuple[int, int, int] = (96, 96, 96)
    load: str | Callable[[Case, FinetuneConfig], np.ndarray] = ""
    augment: Callable[[np.ndarray, np.random.Generator, FinetuneConfig], np.ndarray] | None = None
    head: str = "linear"
    balance: str = "none"
    metrics: Callable[[list[str], np.ndarray, np.ndarray], Mapping[str, float]] | None = None
    entries: Callable[[list[str], np.ndarray, np.ndarray, int, int], Mapping[str, dict[str, Any]]] | None = None
    monitor: str = "auto"
    class_weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class ReportTask:
    """A report for every image.

    Attributes:
        reports: case id -> report as written.
        vocabulary: words that can be written; None only in a benchmark whose ``task_for`` makes the real task.
        labels: names of the 0/1 values in `Case.targets`, which the label and ranking losses learn; may be empty.
        size_dhw: voxels (z, y, x) that the network sees.
        load: as in `ClassificationTask`.
        width: model width of the generator, a multiple of 8 (published: 512).
        max_tokens: longest report in tokens, start and end included.
        beams: hypotheses kept while searching.
        min_words: shortest report.
        length_penalty: scores are divided by length to this power.
        block_trigrams: no three words twice in a report.
        label_loss: weight of the label loss; 0 is off.
        ranking_loss: weight of the ranking loss; 0 is off.
        text_memory: share of the training images whose memory sees their own report (published: 1).
        patch_dropout: share of the training images whose patch tokens are blanked (published: 0).
        dropout: rate in the generator (published: 0.1).
        place_scale: standard deviation of the place vectors of patches and labels at the start; 0: small ones.
        findings: what a report says, as a set of names; None leaves the clinical figures out.
        finding_names: every name that ``findings`` may return.
    """

    reports: Mapping[str, str]
    vocabulary: ReportVocabulary | None = None
    labels: tuple[str, ...] = ()
    size_dhw: tuple[int, int, int] = (128, 96, 128)
    load: str | Callable[[Case, FinetuneConfig], np.ndarray] = ""
    width: int = 512
    max_tokens: int = 150
    beams: int = 3
    min_words: int = 0
    length_penalty: float = 0.0
    block_trigrams: bool = False
    label_loss: float = 0.1
    ranking_loss: float = 0.1
    text_memory: float = 1.0
    patch_dropout: float = 0.0
    dropout: float = 0.1
    place_scale: float = 0.0
    findings: Callable[[str], frozenset[str]] | None = None
    finding_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class VocabularyTask(ClassificationTask):
    """Findings named by text prompts, and reports that ask for their volume (spec downstream 7.4 to 7.9).

    ``outputs`` are the names of the findings, ``kind`` is "binary".

    Attributes:
        reports: case id -> report.
        text_encoder: folder or hub id of encoder and tokenizer.
        templates: pairs of (present, absent) prompts with ``{name}``; the first one is trained, probabilities are
            averaged over all.
        max_tokens: longest text in tokens.
        text_pooling: "cls", or "mean" over the tokens that are no padding.
        text_weights: weights file of the text side, for example CT-CLIP's; empty: those of ``text_encoder``.
        image_tokens: "x4" (the encoder's tokens), "two_sets" (Swin-L: those and as many of the finer maps),
            "multi_scale" (27 patches of all resolutions), or "auto": two_sets with Swin-L, else x4.
        fusion: "gated" cross-attention, or "none" (two separate encoders).
        project: bring both sides to ``width`` by the pre-trained projections; False feeds the encoders' own widths.
        standardise: image tokens and text vectors by the statistics of the training cases (where encoders are frozen).
        width: channels of the cross-attention; pre-trained weights overrule it.
        latent: width of the space in which volumes and texts are compared.
        trainable: parts that learn: latents, temperature, fusion, projections, image_encoder.
        report_loss: weight of the contrastive loss between the reports and volumes of a batch (published: 0).
        group: findings of one optimizer step with ``protocol=reference``.
        pools: pools of the report-to-volume retrieval, see `mg3d.metrics.report_retrieval.POOLS`.
        excluded: ids that the pool ``corrected`` leaves out.
        scored: findings whose mean AUROC is given as ``auroc_scored`` too; empty for none.
    """

    reports: Mapping[str, str] = field(default_factory=dict, hash=False)
    text_encoder: str = ""
    text_weights: str = ""
    templates: tuple[tuple[str, str], ...] = (("{name}. ", "not {name}. "),)
    max_tokens: int = 250
    text_pooling: str = "cls"
    image_tokens: str = "auto"
    fusion: str = "gated"
    project: bool = True
    standardise: bool = False
    width: int = 768
    latent: int = 768
    trainable: tuple[str, ...] = ("latents", "temperature", "fusion", "projections")
    report_loss: float = 0.0
    group: int = 6
    pools: tuple[str, ...] = ("volumes",)
    excluded: frozenset[str] = frozenset()
    scored: tuple[str, ...] = ()


Task = SegmentationTask | ClassificationTask | ReportTask


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: name of its folder.
        task: what is predicted.
        splits: the cases of a config, by use; reads what `prepare` wrote.
        check_data: every problem of the data at once, each one line that names the file and the mend.
        write_phantom: (root, seed) writes a small synthetic data set in the published layout.
        defaults: this benchmark's values of the shared keys.
        extra_keys: keys of this benchmark alone with their defaults, typed by these; read as ``cfg.extra["key"]``.
        named_configs: name -> keys; at least "phantom".
        prepare: turns the download into what `splits` reads; does nothing where that is done already.
        task_for: the task of a config, when it depends on it.
        write_results: (config, run folder, rows of the test cases as in ``per_case.csv``) writes the tables of results
            that users of this data set know; None for none.
        usage: a few lines for ``--help``.
    """

    name: str
    task: Task
    splits: Callable[[FinetuneConfig], Splits]
    check_data: Callable[[FinetuneConfig], list[str]]
    write_phantom: Callable[[Path, int], None]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extra_keys: Mapping[str, Any] = field(default_factory=dict)
    named_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prepare: Callable[[FinetuneConfig], None] | None = None
    task_for: Callable[[FinetuneConfig], Task] | None = None
    write_results: Callable[[FinetuneConfig, Path, list[dict[str, Any]]], None] | None = None
    usage: str = ""

    def resolve_task(self, cfg: FinetuneConfig) -> Task:
        """The task of a config, with the keys that override it (``roi``, ``positive``, ``augment`` ...)."""
        task = self.task_for(cfg) if self.task_for is not None else self.task
        if isinstance(task, ClassificationTask):
            return task if cfg.augment else dataclasses.replace(task, augment=None)
        if isinstance(task, ReportTask):
            return task if cfg.roi is None else dataclasses.replace(task, size_dhw=(cfg.roi[0], cfg.roi[1], cfg.roi[2]))
        keys = ("roi", "overlap", "blending", "crops_per_volume", "positive", "negative")
        given = {key: getattr(cfg, key) for key in keys}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None and value != "task"}
        if not cfg.augment:
            changes["augmentation"] = AugmentationOptions()
        return dataclasses.replace(task, **changes)


class FinetuneModule(Protocol):
    """What `mg3d.finetuning.run` asks of a Lightning module besides Lightning's own methods.

    Attributes:
        encoder: the image encoder (`mg3d.models.vision_encoders.VisionEncoder`), which receives pre-trained weights.
        case_rows: after a validation or test epoch one dictionary a case (segmentation: a case and class), gathered
            over all ranks, sorted by id, without duplicates; the same on every rank.
        prediction_dir: set before testing: folder that predictions are written to; None writes none.
        ensemble: set before testing: other modules whose probabilities are averaged with this one's (a plain list that
            is not registered as sub-modules).
    """

    encoder: Any
    case_rows: list[dict[str, Any]]
    prediction_dir: Path | None
    ensemble: list[Any]

    def features(self, image_BCDHW: Tensor) -> Tensor:
        """Pooled encoder features [B, F] (classification; used by the probes)."""
        ...


class FinetuneData(Protocol):
    """What `mg3d.finetuning.run` asks of a Lightning data module.

    Classification batches are ``{"image": [B, 1, D, H, W], "target": [B, K] or [B], "id": list[str]}``.
    """

    def batches_per_epoch(self, world_size: int) -> int:
        """Batches of one process in a training epoch."""
        ...
