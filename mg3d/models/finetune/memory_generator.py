"""Report generator with a memory: an encoder-decoder in the manner of LaMRG and M2KT (spec downstream 8.5, 8.6).

Shape suffixes: B images, P patch features, F feature width, E model width, M memory slots, C labels, S encoder tokens,
L ids of a report, T = L - 1 predicted positions, V words (ids 0..V), N rows of a search.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.models.finetune.beam_search import Hypotheses, SearchOptions, beam_search, better_of
from mg3d.models.finetune.memory_layers import (
    CachedAttention,
    DecoderLayer,
    EncoderLayer,
    PastWords,
    UnbiasedNorm,
    WordEmbedding,
)

PATCH_SCALE = 4.0


@dataclass(frozen=True)
class GeneratorOptions:
    """Sizes of the generator; the defaults are the published ones.

    Attributes:
        words: V.
        feature_width: F, 1152 with Swin-B and 2304 with Swin-L.
        labels: C.
        width: E.
        hidden: width of the feed-forward layers.
        heads: of every attention.
        layers: of text encoder, image encoder and decoder each.
        memory_slots: M.
        dropout: rate everywhere.
        longest: most ids of a report.
        text_memory: share of the training images whose memory sees the report that is to be written. Published: all
            (1.0), though none does when reports are generated.
        places: P if the generator knows where a patch is: every encoder token has a learned place vector, z_img is a
            linear map of all patches, and the label priors hold it. 0 is as published: z_img is a map of the patches'
            mean, and the decoder cannot tell which part of the chest, or which label, a token stands for.
        patch_dropout: share of the training images whose patch tokens are blanked, so that the report must follow the
            label priors; with few reports the patches are learned by heart. Published: 0.
        place_scale: standard deviation of the place vectors at the start; 0 leaves them small (Xavier), and the decoder
            is slow to find the token of a certain label.
    """

    words: int
    feature_width: int = 1152
    labels: int = 14
    width: int = 512
    hidden: int = 512
    heads: int = 8
    layers: int = 1
    memory_slots: int = 60
    dropout: float = 0.1
    longest: int = 152
    text_memory: float = 1.0
    places: int = 0
    patch_dropout: float = 0.0
    place_scale: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """Plain form for the metadata of weights."""
        return asdict(self)


@dataclass(frozen=True)
class GeneratorOutput:
    """What training needs.

    Attributes:
        logits: [B, T, V + 1] next-word scores.
        image_labels: [B, C] label logits of the image.
        image: [B, E] z_img.
        text_labels: [B, C] label logits of the report; None where the report was not encoded.
        text: [B, E] z_txt; None likewise.
    """

    logits: Tensor
    image_labels: Tensor
    image: Tensor
    text_labels: Tensor | None = None
    text: Tensor | None = None


class MemoryGenerator(nn.Module):
    """Writes a report from patch features, through label embeddings that read a memory.

    Args:
        options: sizes.
    """

    memory: Tensor
    memory_mask: Tensor

    def __init__(self, options: GeneratorOptions) -> None:
        super().__init__()
        self.options = options
        width, heads, rate = options.width, options.heads, options.dropout
        layer = (width, heads, options.hidden, rate)
        # a constant of the published code, but saved and moved with the weights (D62)
        self.register_buffer("memory", torch.eye(options.memory_slots, width))
        self.register_buffer("memory_mask", torch.ones(1, 1, 1, options.memory_slots, dtype=torch.bool))
        self.image_map = nn.Linear(options.feature_width * max(options.places, 1), width)
        self.image_labels = nn.Linear(width, options.labels)
        self.text_labels = nn.Linear(width, options.labels)
        self.memory_map = nn.Linear(width, width)
        self.label_map = nn.Linear(1, width)
        self.prior_map = nn.Linear(width, options.feature_width)
        self.token_map = nn.Linear(options.feature_width, width)
        tokens = options.places + options.labels
        self.token_places = nn.Parameter(torch.empty(tokens, width)) if options.places else None
        self.write, self.read = CachedAttention(width, heads, rate), CachedAttention(width, heads, rate)
        self.norm_memory, self.norm_labels = UnbiasedNorm(width), UnbiasedNorm(width)
        self.dropout = nn.Dropout(rate)
        self.text_words = WordEmbedding(options.words + 1, width, options.longest, rate)
        self.text_encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(options.layers))
        self.text_norm = UnbiasedNorm(width)
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(options.layers))
        self.encoder_norm = UnbiasedNorm(width)
        self.words = WordEmbedding(options.words + 1, width, options.longest, rate)
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(options.layers))
        self.decoder_norm = UnbiasedNorm(width)
        self.scores = nn.Linear(width, options.words + 1)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for extra in (self.image_map, self.image_labels, self.text_labels, self.memory_map, self.label_map):
            nn.init.kaiming_normal_(extra.weight)
            nn.init.zeros_(extra.bias)
        if self.options.places:
            for scaled in (self.image_map, self.token_map):
                nn.init.normal_(scaled.weight, std=1 / PATCH_SCALE)
        if self.token_places is not None and self.options.place_scale:
            nn.init.normal_(self.token_places, std=self.options.place_scale)

    def forward(
        self, feat_BPF: Tensor, image_BF: Tensor, ids_BL: Tensor, *, encode_report: bool = True
    ) -> GeneratorOutput:
        """Predict every next word of given reports.

        Args:
            feat_BPF: patch features.
            image_BF: global feature.
            ids_BL: start, words, end; padded with 0.
            encode_report: False leaves the text encoder out where the memory does not need it either.

        Returns:
            Logits and the vectors of the other losses.
        """
        image_BE = self.image_vector(feat_BPF, image_BF)
        labels_BC = self.image_labels(image_BE)
        memory_BME = self.initial_memory(len(ids_BL))
        told = self.training and self.options.text_memory > 0
        text_BLE, seen_BL = self.encode_text(ids_BL) if told or encode_report else (None, None)
        if told and text_BLE is not None and seen_BL is not None:
            update = self.write(self.norm_memory(memory_BME), text_BLE, seen_BL[:, None, None])
            told_B = torch.rand(len(ids_BL), device=update.device) < self.options.text_memory
            memory_BME = memory_BME + self.dropout(update) * told_B[:, None, None]
        if self.training and self.options.patch_dropout > 0:
            feat_BPF = feat_BPF * (
                torch.rand(len(feat_BPF), 1, 1, device=feat_BPF.device) >= self.options.patch_dropout
            )
        tokens_BSE = self.encode_tokens(self.encoder_tokens(feat_BPF, image_BE, memory_BME))
        logits = self.scores(self._decode(ids_BL[:, :-1], tokens_BSE))
        if text_BLE is None:
            return GeneratorOutput(logits, labels_BC, image_BE)
        return GeneratorOutput(logits, labels_BC, image_BE, self.text_labels(text_BLE[:, 0]), text_BLE[:, 0])

    def freeze_unused(self, *, ranking: bool) -> None:
        """Stop the gradient of what no loss reaches, as training on several devices asks for.

        Args:
            ranking: the ranking loss is on.
        """
        unused: list[nn.Module] = [self.text_labels]  # published without a loss of its own (D63)
        if self.options.text_memory == 0:
            unused += [self.write, self.norm_memory]
            unused += [] if ranking else [self.text_words, self.text_encoder, self.text_norm]
        for part in unused:
            part.requires_grad_(False)

    def encode_text(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Encode reports; returns vectors [B, L, E] and which positions are words or the start [B, L]."""
        seen_BL = _visible(ids_BL)
        text_BLE = self.text_words(ids_BL)
        for layer in self.text_encoder:
            text_BLE = layer(text_BLE, seen_BL[:, None, None])
        return self.text_norm(text_BLE), seen_BL

    def initial_memory(self, batch: int) -> Tensor:
        """Memory before any report: the constant slots, mapped; [B, M, E]."""
        return self.memory_map(self.memory).expand(batch, -1, -1)

    def image_vector(self, feat_BPF: Tensor, image_BF: Tensor) -> Tensor:
        """z_img [B, E]."""
        return self.image_map(self._scaled(feat_BPF.flatten(1)) if self.options.places else image_BF)

    def _scaled(self, wide: Tensor) -> Tensor:
        """Features scaled down to the length `PATCH_SCALE`, where the generator knows the places.

        A step of Adam then changes a map of thousands of inputs no more than one of few, and few training images are
        not learned by heart.
        """
        return wide * (PATCH_SCALE / math.sqrt(wide.shape[-1])) if self.options.places else wide

    def encoder_tokens(self, feat_BPF: Tensor, image_BE: Tensor, memory_BME: Tensor) -> Tensor:
        """Patch features and label priors side by side, [B, P + C, F]: 27 + 14 = 41 tokens."""
        embedded_BCE = self.label_map(self.image_labels(image_BE)[..., None])
        if self.options.places:
            embedded_BCE = embedded_BCE + image_BE[:, None]
        read = self.read(self.norm_labels(embedded_BCE), memory_BME, self.memory_mask)
        return torch.cat([feat_BPF, self.prior_map(embedded_BCE + self.dropout(read))], dim=1)

    def encode_tokens(self, tokens_BSF: Tensor) -> Tensor:
        """Encode what the decoder reads, [B, S, E]."""
        tokens_BSE = self.token_map(self._scaled(tokens_BSF))
        if self.token_places is not None:
            tokens_BSE = tokens_BSE + self.token_places
        tokens_BSE = self.dropout(tokens_BSE)
        for layer in self.encoder:
            tokens_BSE = layer(tokens_BSE)
        return self.encoder_norm(tokens_BSE)

    def encode(self, feat_BPF: Tensor, image_BF: Tensor) -> Tensor:
        """Encode images without reports, as at test time; [B, S, E]."""
        image_BE = self.image_vector(feat_BPF, image_BF)
        return self.encode_tokens(self.encoder_tokens(feat_BPF, image_BE, self.initial_memory(len(image_BF))))

    def _decode(self, ids_BT: Tensor, tokens_BSE: Tensor) -> Tensor:
        length = ids_BT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=ids_BT.device).tril()
        mask = _visible(ids_BT)[:, None, None] & causal_TT
        hidden_BTE = self.words(ids_BT)
        for layer in self.decoder:
            hidden_BTE = layer(hidden_BTE, tokens_BSE, mask)
        return self.decoder_norm(hidden_BTE)

    def generate(
        self, feat_BPF: Tensor, image_BF: Tensor, options: SearchOptions | None = None, *, cached: bool = True
    ) -> Hypotheses:
        """Write reports; the module should be in evaluation mode.

        The greedy report of every image takes part, so that the score never falls below that of greedy search.

        Args:
            feat_BPF: patch features.
            image_BF: global feature.
            options: how to search; beam 3 when None.
            cached: keep keys and values; False decodes every prefix anew, for comparison.

        Returns:
            Words and scores.
        """
        options = options or SearchOptions(max_words=self.options.longest - 2)
        found = None
        with torch.no_grad():
            tokens_BSE = self.encode(feat_BPF, image_BF)
            for beams in sorted({options.beams, 1}, reverse=True):
                searched = SearchOptions(**{**asdict(options), "beams": beams})
                decoder: Any = PrefixDecoder(self, tokens_BSE, beams)
                if cached:
                    decoder = CachedDecoder(self, tokens_BSE, beams, options.max_words + 1)
                each = beam_search(decoder, len(tokens_BSE), searched, tokens_BSE.device)
                found = each if found is None else better_of(found, each)
        if found is None:
            raise RuntimeError("nothing was searched")
        return found


class CachedDecoder:
    """Decodes one position at a time; keys and values of the past and of the images are kept.

    Args:
        model: the generator.
        tokens_BSE: encoded images.
        beams: rows of each image.
        longest: most positions.
    """

    def __init__(self, model: MemoryGenerator, tokens_BSE: Tensor, beams: int, longest: int) -> None:
        self.model = model
        heads, width = model.options.heads, model.options.width
        shape = (len(tokens_BSE) * beams, heads, longest, width // heads)
        self.layers: list[DecoderLayer] = list(model.decoder)  # type: ignore[arg-type]
        self.images = [layer.cross_attention.keys_values(tokens_BSE) for layer in self.layers]
        self.past = [PastWords(tokens_BSE.new_empty(shape), tokens_BSE.new_empty(shape)) for _ in self.layers]

    def step(self, ids_NT: Tensor) -> Tensor:
        """Log-probabilities of the next word; only the last column of ``ids_NT`` is decoded."""
        hidden_N1E = self.model.words(ids_NT[:, -1:], first=self.past[0].length)
        for layer, past, image in zip(self.layers, self.past, self.images, strict=True):
            hidden_N1E = layer.next_word(hidden_N1E, past, image)
        return self.model.scores(self.model.decoder_norm(hidden_N1E[:, 0])).log_softmax(dim=-1)

    def reorder(self, rows_N: Tensor) -> None:
        """Take over the past of other rows of the same image."""
        for past in self.past:
            past.reorder(rows_N)


class PrefixDecoder:
    """Decodes the whole prefix at every step, as published; the yardstick of :class:`CachedDecoder`.

    Args:
        model: the generator.
        tokens_BSE: encoded images.
        beams: rows of each image.
    """

    def __init__(self, model: MemoryGenerator, tokens_BSE: Tensor, beams: int) -> None:
        self.model = model
        self.tokens_NSE = tokens_BSE.repeat_interleave(beams, dim=0)

    def step(self, ids_NT: Tensor) -> Tensor:
        """Log-probabilities of the next word."""
        hidden_NTE = self.model._decode(ids_NT, self.tokens_NSE)
        return self.model.scores(hidden_NTE[:, -1]).log_softmax(dim=-1)

    def reorder(self, rows_N: Tensor) -> None:
        """Nothing is kept."""


def _visible(ids_BL: Tensor) -> Tensor:
    """Words and the start; the end and padding, all of them 0, are hidden."""
    seen_BL = ids_BL > 0
    seen_BL[:, 0] = True
    return seen_BL
