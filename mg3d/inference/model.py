"""A loaded model and its questions: features of volumes, vectors of texts, similarity of both.

B volumes or texts, D/H/W volume axes, N image tokens, E encoder width, P shared space, K prompts, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mg3d.datasets.collate import collate_reports
from mg3d.datasets.report_text import ReportEncoding
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, MG3DError
from mg3d.inference import weights
from mg3d.inference.places import Place, find_weights
from mg3d.inference.processor import ProcessedScan, Processor, make_processor
from mg3d.inference.text import tokenize_prompts
from mg3d.inference.volumes import check_volumes, pool_crops
from mg3d.models.checkpoint import CoverageReport
from mg3d.models.language_encoders import create_tokenizer
from mg3d.models.language_encoders.checks import check_vocabulary
from mg3d.models.network import MG3DNetwork
from mg3d.models.vision_encoders import VisionEncoder
from mg3d.models.vision_encoders.unet import AlwaysBatchNorm3d
from mg3d.models.weights_file import tensor_digest

Output = Literal["embedding", "pooled", "tokens", "stages"]
OUTPUTS = ("embedding", "pooled", "tokens", "stages")

NO_SPACE = "these weights hold no trained space that images and texts share"
NO_SPACE_MEND = (
    "use output='pooled' for image features; for texts train with loss_names.itc above 0, or load weights so trained"
)


@dataclass(frozen=True)
class ZeroShot:
    """Answer of :meth:`MG3DModel.zero_shot`.

    Attributes:
        prompts: the K prompts.
        scores: [B, K] cosines; with negatives, cosine of the prompt minus that of its negative.
        probabilities: [B, K]; softmax over the prompts, or with negatives of each prompt against its own.
    """

    prompts: tuple[str, ...]
    scores: Tensor
    probabilities: Tensor


class MG3DModel:
    """Weights ready for use: frozen, in evaluation mode.

    Args:
        network: :class:`~mg3d.models.network.MG3DNetwork`, or a module with ``vision_encoder``.
        name: where the weights came from.
        metadata: what is recorded about them.
        report: what became of every tensor; None for random weights.
        has_shared_space: whether image and text vectors may be compared.
        preparation: recorded preparation of scans.
        tokenizer_places: folders or hub ids of the tokenizer, best first.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        metadata: dict[str, Any],
        report: CoverageReport | None,
        has_shared_space: bool,
        preparation: dict[str, Any],
        tokenizer_places: Sequence[str] = (),
    ) -> None:
        self._network = network
        self.name = name
        self.metadata = metadata
        self.report = report
        self.has_shared_space = has_shared_space
        self.preparation = preparation
        self._tokenizer_places = tuple(tokenizer_places)

    def __repr__(self) -> str:
        encoder = self.vision_encoder
        space = f"shared space of {self.embedding_width}" if self.has_shared_space else "no shared image-text space"
        return f"MG3DModel({encoder.name}, tokens of {encoder.out_channels}, {space}, from {self.name})"

    # ---------------------------------------------------------------- parts
    @property
    def vision_encoder(self) -> VisionEncoder:
        """The image encoder."""
        encoder = self._network.vision_encoder
        if not isinstance(encoder, VisionEncoder):
            raise TypeError(f"{type(encoder).__name__} is no image encoder")
        return encoder

    @property
    def network(self) -> MG3DNetwork:
        """The whole pre-training network.

        Raises:
            CheckpointError: the weights hold the image encoder alone.
        """
        if not isinstance(self._network, MG3DNetwork):
            raise CheckpointError(
                f"{self.name} holds an image encoder alone, without text encoder and fusion layers",
                "load a whole pre-training checkpoint",
            )
        return self._network

    @cached_property
    def processor(self) -> Processor:
        """Preparation of scans as in training, see :func:`mg3d.load_processor`."""
        return make_processor(self.preparation)

    @cached_property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer.

        Raises:
            EnvironmentProblem: it is not where the weights say, and the hub does not answer.
            ConfigError: it lacks special tokens, or has tokens that the text encoder has no embedding for.
        """
        problem: MG3DError = EnvironmentProblem(
            f"{self.name} does not say which tokenizer belongs to it", "load_model(..., tokenizer=<its folder>)"
        )
        for place in self._tokenizer_places:
            try:
                tokenizer = create_tokenizer(place)
            except ConfigError:  # it is there, and wrong
                raise
            except MG3DError as error:
                problem = EnvironmentProblem(error.message, "load_model(..., tokenizer=<folder of the tokenizer>)")
                continue
            if isinstance(self._network, MG3DNetwork):
                check_vocabulary(tokenizer, self._network.language_encoder.vocab_size, place)
            return tokenizer
        raise problem

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and bytes of all loaded tensors."""
        return tensor_digest({name: value.cpu() for name, value in self._network.state_dict().items()})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._network.parameters()).device

    def to(self, device: str | torch.device) -> MG3DModel:
        """Move the weights; returns the model."""
        self._network.to(device)
        return self

    @property
    def embedding_width(self) -> int:
        """P, width of the shared space; raises without one."""
        projection = self._shared().image_text_itc_head.image_proj[-1]
        return int(projection.out_features)  # type: ignore[arg-type]

    @property
    def logit_scale(self) -> float:
        """Factor of the cosines before a softmax: one over the temperature of the training; raises without a space."""
        return 1.0 / self._shared().image_text_itc_head.temperature

    def _shared(self) -> MG3DNetwork:
        if not self.has_shared_space:
            raise CheckpointError(f"{self.name}: {NO_SPACE}", NO_SPACE_MEND)
        return self.network

    # ---------------------------------------------------------------- images
    @torch.no_grad()
    def encode_image(
        self, volumes: Tensor | np.ndarray | ProcessedScan, output: Output = "embedding", batch_size: int = 4
    ) -> Tensor | list[Tensor]:
        """Encode volumes, or one scan.

        Args:
            volumes: [B, 1, D, H, W] in [0, 1]; or what a processor made of one scan, whose crops become one row
                (B = 1): vectors are averaged (unit vectors again brought to unit length), tokens put in a row.
            output: ``embedding`` unit vectors [B, P] of the shared space; ``pooled`` mean tokens [B, E]; ``tokens``
                [B, N, E]; ``stages`` feature maps [B, C, d, h, w] (of a scan: one row per crop), finest first.
            batch_size: volumes that are encoded together; an encoder that normalises over the batch gets one at a
                time, so that no scan changes another's features.

        Returns:
            Float32 on the CPU.

        Raises:
            DataError: no volumes in [0, 1].
            CheckpointError: ``embedding`` without a trained shared space.
        """
        if output not in OUTPUTS:
            raise DataError(f"output={output!r} is not known", f"choose one of {', '.join(OUTPUTS)}")
        if output == "embedding":
            self._shared()
        batch = check_volumes(volumes.volumes if isinstance(volumes, ProcessedScan) else volumes)
        parts = [self._encode(part.to(self.device), output) for part in self._portions(batch, batch_size)]
        maps = [torch.cat([part[k] for part in parts]).float().cpu() for k in range(len(parts[0]))]
        if output == "stages":
            return maps
        return pool_crops(maps[0], output) if isinstance(volumes, ProcessedScan) else maps[0]

    def vectors(
        self, volumes: Tensor | np.ndarray | ProcessedScan, output: Output = "embedding", batch_size: int = 4
    ) -> Tensor:
        """As :meth:`encode_image` for the outputs that are one tensor."""
        found = self.encode_image(volumes, output, batch_size)
        if isinstance(found, list):
            raise DataError("stages are several maps", "use encode_image")
        return found

    def _portions(self, batch: Tensor, batch_size: int) -> Iterator[Tensor]:
        normalises_by_batch = any(isinstance(part, AlwaysBatchNorm3d) for part in self.vision_encoder.modules())
        yield from batch.split(1 if normalises_by_batch else max(batch_size, 1))

    def _encode(self, batch: Tensor, output: Output) -> list[Tensor]:
        encoder = self.vision_encoder
        if output == "stages":
            return encoder.forward_features(batch)
        tokens_BNE = encoder.tokens(batch)
        if output == "embedding":
            return [self.network.image_text_itc_head.embed_image(tokens_BNE)]
        return [tokens_BNE if output == "tokens" else tokens_BNE.mean(dim=1)]

    # ---------------------------------------------------------------- texts
    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, each taken as one sentence, as the evaluation encodes prompts.

        Args:
            texts: prompts or short reports; what exceeds the text encoder's length is cut.

        Returns:
            Unit vectors [B, P], float32 on the CPU.

        Raises:
            CheckpointError: no trained shared space.
            DataError: no or empty texts.
            EnvironmentProblem: the tokenizer is not at hand.
        """
        network = self._shared()
        ids, mask = tokenize_prompts(self.tokenizer, texts, network.language_encoder.max_length, self.device)
        parts = [network.encode_text(*part) for part in zip(ids.split(64), mask.split(64), strict=True)]
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def encode_reports(self, reports: Sequence[ReportEncoding]) -> Tensor:
        """Encode tokenised reports sentence by sentence, as training and its evaluation do.

        Args:
            reports: from :func:`mg3d.datasets.report_text.encode_report` or a sample of the training data.

        Returns:
            Unit vectors [B, P], float32 on the CPU; zeros for a report without words.

        Raises:
            CheckpointError: no trained shared space.
        """
        network, batch = self._shared(), collate_reports(reports)
        moved = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
        return network.encode_report(moved).float().cpu()

    def zero_shot(
        self,
        volumes: Tensor | np.ndarray | ProcessedScan,
        prompts: Sequence[str],
        negatives: Sequence[str] | None = None,
    ) -> ZeroShot:
        """Compare volumes with prompts.

        Args:
            volumes: as for :meth:`encode_image`.
            prompts: K texts; without negatives they compete with each other.
            negatives: K texts that say the opposite; each pair is then judged alone, as in the evaluation.

        Raises:
            CheckpointError: no trained shared space.
            DataError: another number of negatives than prompts.
        """
        return self.compare(self.vectors(volumes), prompts, negatives)

    def compare(self, image_BP: Tensor, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> ZeroShot:
        """As :meth:`zero_shot`, of image vectors [B, P] that were made before."""
        if negatives is not None and len(negatives) != len(prompts):
            raise DataError(f"{len(prompts)} prompts but {len(negatives)} negatives", "give one negative per prompt")
        scores = image_BP @ self.encode_text(prompts).t()
        if negatives is None:
            return ZeroShot(tuple(prompts), scores, torch.softmax(self.logit_scale * scores, dim=1))
        scores = scores - image_BP @ self.encode_text(negatives).t()
        return ZeroShot(tuple(prompts), scores, torch.sigmoid(self.logit_scale * scores))


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    allow_partial: bool = False,
    random_init: bool = False,
    tokenizer: str | Path | None = None,
) -> MG3DModel:
    """Load weights, whatever their source; the coverage report is logged and kept as ``report``.

    Args:
        name_or_path: export folder, checkpoint, run folder (its last checkpoint), released or other weights file (the
            architecture follows from its tensors), ``org/name`` on the hub, or an architecture such as ``swin_b``.
        device: where to put the weights.
        allow_partial: accept weights that cover less than 95 % of the image encoder.
        random_init: an architecture name is meant: draw its weights at random.
        tokenizer: folder or hub id of the text encoder's tokenizer, for weights that do not bring it.

    Returns:
        The model, frozen and in evaluation mode.

    Raises:
        CheckpointError: no such weights, or damaged, incomplete or unknown ones.
        EnvironmentProblem: a hub id, and the hub does not answer; or no such device.
    """
    place = find_weights(name_or_path)
    if random_init != (place.kind == "architecture"):
        raise _without_weights(place.name, random_init)
    model = _random(place) if random_init else _loaded(place, allow_partial, (str(tokenizer),) if tokenizer else ())
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(f"cannot use device {device}: {str(error).splitlines()[0]}", "use cpu") from error


def _random(place: Place) -> MG3DModel:
    network = weights.random_network(str(place.path))
    return MG3DModel(
        network,
        name=place.name,
        metadata={"vision_encoder": network.vision_encoder.metadata()},
        report=None,
        has_shared_space=False,
        preparation=published_geometry(),
    )


def _loaded(place: Place, allow_partial: bool, tokenizer: tuple[str, ...]) -> MG3DModel:
    stored = weights.read_stored(place, allow_partial)
    network, report = weights.build_network(stored)
    weights.check_loaded(report, place.name, allow_partial)
    return MG3DModel(
        network,
        name=place.name,
        metadata=stored.metadata,
        report=report,
        has_shared_space=weights.has_trained_space(stored, report),
        preparation=stored.preparation,
        tokenizer_places=tokenizer or stored.tokenizer,
    )


def _without_weights(name: str, random_init: bool) -> MG3DError:
    if random_init:
        return CheckpointError(f"{name} holds weights, random_init=True draws new ones", "leave out random_init")
    return CheckpointError(
        f"{name} is an architecture, and no weights come with this package",
        "give a weights file or folder, or random_init=True for an untrained encoder",
    )
