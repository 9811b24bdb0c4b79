"""The report labeller: a transformer text encoder and one linear layer, one independent sigmoid per finding.

It reads a report whole (as published: RadBERT, pooled output, 512 tokens) or sentence by sentence; a finding of a
report is then as likely as in the sentence that states it most clearly, and no report is ever cut.

Shape suffixes: B reports, U distinct sequences, P (report, sequence) pairs, T tokens, E encoder width, L findings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mg3d.atomic import atomic_folder
from mg3d.errors import CheckpointError, ConfigError
from mg3d.models.bounds import read_json_object
from mg3d.models.language_encoders import BertTextEncoder, create_text_encoder, create_tokenizer
from mg3d.models.optimization import NO_DECAY_PARTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ClassifierOptions", "ReportClassifier", "ReportLabeller", "parameter_groups"]

Splitter = Callable[[str], list[str]]
TOKENS_PER_CHUNK = 2048
"""Padded tokens that the encoder sees at once; sequences are sorted by length, so little of it is padding."""

SENTENCE_BIAS = -3.0
"""Where the linear layer starts when it reads sentences: few of them state a finding."""

_OPTIONS, _WEIGHTS, _ENCODER = "classifier.json", "model.safetensors", "encoder"


@dataclass(frozen=True)
class ClassifierOptions:
    """What the labeller is made of.

    Attributes:
        findings: names of the L outputs.
        unit: ``report``: one sequence a report; ``sentence``: one a sentence, the largest logit counts.
        pooling: ``pooler`` the encoder's pooled output, ``cls`` its first token, ``mean`` the mean over tokens.
        max_length: tokens a sequence is cut to, at least 8.
        dropout: before the linear layer, in training.
    """

    findings: tuple[str, ...]
    unit: Literal["report", "sentence"] = "report"
    pooling: Literal["pooler", "cls", "mean"] = "pooler"
    max_length: int = 512
    dropout: float = 0.1

    def __post_init__(self) -> None:
        allowed = {"unit": ("report", "sentence"), "pooling": ("pooler", "cls", "mean")}
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ConfigError(f"{key}={getattr(self, key)!r}", f"choose one of {', '.join(values)}")
        if not self.findings or self.max_length < 8 or not 0 <= self.dropout < 1:
            raise ConfigError(f"unusable options: {self}", "give findings, max_length >= 8 and dropout in [0, 1)")


@dataclass(frozen=True)
class TextBatch:
    """Tokenised reports.

    Attributes:
        chunks: (ids, mask) pairs [<= U, T] that together hold the U distinct sequences.
        sequence: sequence of each pair [P].
        report: report of each pair [P].
        reports: B.
    """

    chunks: tuple[tuple[Tensor, Tensor], ...]
    sequence: Tensor
    report: Tensor
    reports: int

    def to(self, device: torch.device) -> TextBatch:
        """The same on another device."""
        chunks = tuple((ids.to(device), mask.to(device)) for ids, mask in self.chunks)
        return TextBatch(chunks, self.sequence.to(device), self.report.to(device), self.reports)


@dataclass(frozen=True)
class TextFeatures:
    """Text vectors of reports that were encoded once.

    Attributes:
        pooled: [U, E].
        batch: which report holds which sequence; its chunks are empty.
    """

    pooled: Tensor
    batch: TextBatch

    def take(self, reports: np.ndarray) -> tuple[Tensor, Tensor, Tensor, int]:
        """Arguments of :meth:`ReportClassifier.score` for some reports, in that order."""
        place = torch.full((self.batch.reports,), -1)
        place[torch.from_numpy(reports)] = torch.arange(len(reports))
        owner = place[self.batch.report]
        kept = owner >= 0
        sequences, inverse = self.batch.sequence[kept].unique(return_inverse=True)
        device = self.pooled.device
        return self.pooled[sequences.to(device)], inverse.to(device), owner[kept].to(device), len(reports)


class ReportClassifier(nn.Module):
    """Encoder, pooling, dropout, linear layer.

    Args:
        encoder: BERT-like text encoder.
        options: see :class:`ClassifierOptions`.

    Raises:
        ConfigError: the pooled output is asked of an encoder that has none.
    """

    def __init__(self, encoder: BertTextEncoder, options: ClassifierOptions) -> None:
        super().__init__()
        if options.pooling == "pooler" and encoder.pooler is None:
            raise ConfigError("the text encoder has no pooler", "set pooling to cls or mean")
        if options.pooling != "pooler":
            encoder.pooler = None
        self.encoder, self.pooling = encoder, options.pooling
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(encoder.embed_dim, len(options.findings))
        if options.unit == "sentence":
            nn.init.constant_(self.head.bias, SENTENCE_BIAS)

    def forward(self, batch: TextBatch) -> Tensor:
        """Logits [B, L]: of each report the largest over its sequences."""
        pooled_UE = torch.cat([self.dropout(self.pool(ids, mask)) for ids, mask in batch.chunks])
        return self.score(pooled_UE, batch.sequence, batch.report, batch.reports)

    def score(self, pooled_UE: Tensor, sequence: Tensor, report: Tensor, reports: int) -> Tensor:
        """Logits [B, L] from text vectors.

        Args:
            pooled_UE: of U sequences.
            sequence: sequence of each pair [P].
            report: report of each pair [P].
            reports: B.
        """
        logits_PL = self.head(pooled_UE)[sequence]
        found_BL = logits_PL.new_zeros((reports, logits_PL.shape[1]))
        owner_PL = report[:, None].expand_as(logits_PL)
        return found_BL.scatter_reduce(0, owner_PL, logits_PL, reduce="amax", include_self=False)

    def pool(self, ids_UT: Tensor, mask_UT: Tensor) -> Tensor:
        """Text vectors [U, E] of token ids [U, T]."""
        hidden_UTE = self.encoder(ids_UT, mask_UT)
        if self.pooling == "cls":
            return hidden_UTE[:, 0]
        if self.pooling == "mean":
            weight_UT1 = mask_UT[..., None].to(hidden_UTE.dtype)
            return (hidden_UTE * weight_UT1).sum(1) / weight_UT1.sum(1).clamp_min(1)
        pooler = self.encoder.pooler
        if pooler is None:
            raise ConfigError("the text encoder lost its pooler", "build the classifier anew")
        return pooler(hidden_UTE)

    def freeze_lower_layers(self, layers: int) -> None:
        """Keep the embeddings and the first transformer layers as they are.

        Args:
            layers: how many; 0 freezes nothing, not even the embeddings.

        Raises:
            ConfigError: more layers than there are.
        """
        stack = getattr(self.encoder.encoder, "layer", ())
        if not 0 <= layers <= len(stack):
            raise ConfigError(f"freeze_layers={layers}", f"choose 0 to {len(stack)}")
        if layers:
            for part in (self.encoder.embeddings, *stack[:layers]):
                part.requires_grad_(False)


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and biases and norms without.

    Args:
        module: the classifier.
        learning_rate: of both groups.
        weight_decay: of the first group; the second has 0.

    Returns:
        Groups for AdamW, ``weight_decay`` being the key that torch reads.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[not any(part in name for part in NO_DECAY_PARTS)].append(parameter)
    rates = {True: weight_decay, False: 0.0}
    return [
        {"params": found, "lr": learning_rate, "weight_decay": rates[decayed]}
        for decayed, found in groups.items()
        if found
    ]


class ReportLabeller:
    """A classifier with its tokenizer: reports in, probabilities of findings out.

    Args:
        network: the classifier.
        tokenizer: of its encoder.
        options: see :class:`ClassifierOptions`.
        splitter: report -> sentences, for ``unit="sentence"``.

    Raises:
        ConfigError: sentences are asked for without a splitter, or more tokens than the encoder has positions.
    """

    def __init__(
        self,
        network: ReportClassifier,
        tokenizer: PreTrainedTokenizerBase,
        options: ClassifierOptions,
        splitter: Splitter | None = None,
    ) -> None:
        if options.unit == "sentence" and splitter is None:
            raise ConfigError("unit=sentence needs a function that splits reports", "give one, or unit=report")
        if options.max_length > network.encoder.max_length:
            raise ConfigError(
                f"max_length={options.max_length}", f"the encoder has {network.encoder.max_length} positions"
            )
        self.network, self.tokenizer, self.options, self.splitter = network, tokenizer, options, splitter

    @classmethod
    def create(
        cls,
        text_encoder: str,
        options: ClassifierOptions,
        splitter: Splitter | None = None,
        *,
        random_init: bool = False,
    ) -> ReportLabeller:
        """A fresh labeller on a pre-trained encoder.

        Args:
            text_encoder: hub id or local directory.
            options: see :class:`ClassifierOptions`.
            splitter: report -> sentences.
            random_init: take only the architecture of the encoder.

        Raises:
            EnvironmentProblem: the encoder or its tokenizer cannot be loaded.
        """
        encoder = create_text_encoder(
            text_encoder, frozen=False, eval_mode=False, random_init=random_init, drop_rate=options.dropout
        )
        return cls(ReportClassifier(encoder, options), create_tokenizer(text_encoder), options, splitter)

    def encode(self, texts: Sequence[str]) -> TextBatch:
        """Tokenise reports; equal sequences are encoded once, an empty report is one empty sequence."""
        parts = [self._sequences(text) for text in texts]
        distinct = list(dict.fromkeys(sequence for sequences in parts for sequence in sequences))
        found = self.tokenizer(distinct, truncation=True, max_length=self.options.max_length)["input_ids"]
        order = sorted(range(len(distinct)), key=lambda number: (len(found[number]), number))
        place = {distinct[number]: rank for rank, number in enumerate(order)}
        pairs = [(place[sequence], report) for report, sequences in enumerate(parts) for sequence in sequences]
        sequence, report = torch.tensor(pairs).T
        return TextBatch(self._chunks([found[number] for number in order]), sequence, report, len(texts))

    def _sequences(self, text: str) -> list[str]:
        if self.splitter is None or self.options.unit == "report":
            return [text]
        return self.splitter(text) or [""]

    def _chunks(self, ids: Sequence[list[int]]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Rows padded to the longest of their chunk; ``ids`` ascend in length."""
        chunks, start = [], 0
        for number in range(1, len(ids) + 1):
            full = number == len(ids) or (number + 1 - start) * len(ids[number]) > TOKENS_PER_CHUNK
            if full:
                padded = self.tokenizer.pad({"input_ids": list(ids[start:number])}, return_tensors="pt")
                chunks.append((padded["input_ids"], padded["attention_mask"]))
                start = number
        return tuple(chunks)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Text vectors of reports, for training the linear layer alone."""
        device = next(self.network.parameters()).device
        batch = self.encode(texts)
        pooled = torch.cat([self.network.pool(ids.to(device), mask.to(device)) for ids, mask in batch.chunks])
        return TextFeatures(pooled.float(), TextBatch((), batch.sequence, batch.report, batch.reports))

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Probability of every finding.

        Args:
            texts: n reports.
            batch_size: reports a step, at least 1.

        Returns:
            float32 [n, L] in [0, 1].
        """
        was_training = self.network.training
        self.network.eval()
        device = next(self.network.parameters()).device
        steps = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        found = [torch.sigmoid(self.network(self.encode(step).to(device))).float().cpu().numpy() for step in steps]
        self.network.train(was_training)
        return np.concatenate(found) if found else np.zeros((0, len(self.options.findings)), dtype=np.float32)

    def label(self, texts: Sequence[str], threshold: float = 0.5, batch_size: int = 32) -> np.ndarray:
        """Findings of reports, int8 [n, L]: 1 where the probability is above the threshold; none in an empty one."""
        stated = np.array([bool(text.strip()) for text in texts], dtype=bool)[:, None]
        return (stated & (self.probabilities(texts, batch_size) > threshold)).astype(np.int8)

    def save(self, folder: Path) -> None:
        """Write options, weights, and the encoder's config and tokenizer, all or nothing; nothing in it is pickled."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        with atomic_folder(folder, needed=sum(value.nbytes for value in state.values())) as partial:
            encoder = partial / _ENCODER
            encoder.mkdir()
            (encoder / "config.json").write_text(
                json.dumps(self.network.encoder.plain_config(), indent=1), encoding="utf-8"
            )
            self.tokenizer.save_pretrained(encoder)
            save_file(state, partial / _WEIGHTS, {"format": "pt"})
            (partial / _OPTIONS).write_text(json.dumps(asdict(self.options), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, splitter: Splitter | None = None) -> ReportLabeller:
        """Read what :meth:`save` wrote, in eval mode.

        Args:
            folder: the folder.
            splitter: report -> sentences.

        Raises:
            CheckpointError: the folder is incomplete or its weights do not fit.
        """
        missing = [name for name in (_OPTIONS, _WEIGHTS, _ENCODER) if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}", "give the best/ folder of a training run")
        try:
            content = read_json_object(folder / _OPTIONS)
            options = ClassifierOptions(**{**content, "findings": tuple(content["findings"])})
            labeller = cls.create(str(folder / _ENCODER), options, splitter, random_init=True)
            labeller.network.load_state_dict(load_file(folder / _WEIGHTS))
        except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise CheckpointError(f"{folder}: {' '.join(lines[:2])[:200]}", "train the classifier anew") from error
        labeller.network.eval()
        return labeller
