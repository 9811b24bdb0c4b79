"""Reports: cleaning, comma fragments, and the token view of one report that the objectives need.

L text tokens after padding, S sentences (fragments that own a visible token).
"""

from __future__ import annotations

import math
import os
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from mg3d.datasets.sentence_splitter import split_into_sentences

# fragments are short: threads cost more than they give, and a pool does not survive the fork of a loader worker
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FragmentSeparator = Literal["blank", "none_reference"]
NO_SENTENCE: Final = -1
MIN_WORDS: Final = 3
_MISSING: Final = frozenset(
    {"nan", "none", "null", "na", "n/a", "<na>", "not given", "not given.", "unknown", "-", "--", "."}
)
_MISSING_FRAGMENT: Final = frozenset({"nan", "<na>", "not given", "not given."})
_DELIMITER: Final = re.compile(r"[,;]\s*")


def clean_text(value: object) -> str:
    """Return normalised text: NFC, no control characters, single blanks; missing values become "".

    None, a float NaN and the words a table leaves for an empty cell ("nan", "N/A", "Not given." ...) are missing.
    Idempotent.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    visible = (char for char in text if char.isspace() or (unicodedata.category(char) != "Cc" and char != "\ufeff"))
    text = normalise_whitespace(unicodedata.normalize("NFC", "".join(visible)))
    return "" if text.lower() in _MISSING else text


def normalise_whitespace(text: str) -> str:
    """Collapse every whitespace run to one blank and strip."""
    return " ".join(text.split())


def split_fragments(section: str) -> list[str]:
    """Split a normalised section into comma fragments (reference behaviour: spec pretraining 3.1).

    The section is cut after every ". ", then at commas and semicolons outside round brackets. Fragments keep their
    delimiter and the blank after it; blank ones are dropped. Linear in the length of the text.
    """
    pieces = section.split(". ")
    pieces = [piece + ". " for piece in pieces[:-1]] + pieces[-1:]
    return [fragment for piece in pieces for fragment in _split_piece(piece)]


def _split_piece(piece: str) -> list[str]:
    fragments: list[str] = []
    start = 0
    for match in _open_delimiters(piece):
        part = piece[start : match.start()]
        if part.strip():
            fragments.append(part.strip() + match.group())
        start = match.end()
    if piece[start:].strip():
        fragments.append(piece[start:])
    return fragments


def _open_delimiters(piece: str) -> list[re.Match[str]]:
    """Delimiters whose next bracket to the right is not a closing one; one pass from the right."""
    closing = False
    position = len(piece)
    found = []
    for match in reversed(list(_DELIMITER.finditer(piece))):
        between = piece[match.end() : position]
        first_open, first_close = between.find("("), between.find(")")
        if first_open >= 0 or first_close >= 0:
            closing = first_close >= 0 and (first_open < 0 or first_close < first_open)
        position = match.end()
        if not closing:
            found.append(match)
    return found[::-1]


@dataclass(frozen=True)
class ReportSections:
    """One report as the Arrow row stores it.

    Args:
        caption: findings and impression in one normalised text, no separator (published layout).
        findings: normalised findings; "" when absent.
        impression: normalised impression; "" when absent.
        findings_sen: comma fragments of the findings.
        impression_sen: comma fragments of the impression.
    """

    caption: str
    findings: str
    impression: str
    findings_sen: tuple[str, ...]
    impression_sen: tuple[str, ...]


def prepare_sections(findings: object, impression: object, *, min_words: int = MIN_WORDS) -> ReportSections:
    """Clean the two sections of a report and split them into fragments (spec pretraining 2.3).

    Findings of fewer than ``min_words`` words are dropped; an impression is always kept.
    """
    findings_text, impression_text = clean_text(findings), clean_text(impression)
    caption = clean_text((str(findings) if findings_text else "") + (str(impression) if impression_text else ""))
    if len(findings_text.split()) < min_words:
        findings_text = ""
    return ReportSections(
        caption=caption if len(caption.split()) >= min_words else "",
        findings=findings_text,
        impression=impression_text,
        findings_sen=tuple(split_fragments(findings_text)),
        impression_sen=tuple(split_fragments(impression_text)),
    )


@dataclass(frozen=True)
class SentenceEncoding:
    """One sentence alone: its text and its token ids, [CLS] and [SEP] included."""

    text: str
    input_ids: list[int]


@dataclass(frozen=True)
class ReportEncoding:
    """The token view of one report.

    Args:
        text: the joined fragments.
        input_ids: int64 ``[L]``, padded.
        attention_mask: int64 ``[L]``, 1 = token.
        sentence_index: int64 ``[L]``, -1 = none, k = token of the k-th sentence (from 1).
        sentences: stand-alone encoding of each sentence, length S.
        has_text: False for an empty report.
    """

    text: str
    input_ids: np.ndarray
    attention_mask: np.ndarray
    sentence_index: np.ndarray
    sentences: list[SentenceEncoding] = field(default_factory=list)
    has_text: bool = True


def encode_report(
    tokenizer: Any,
    findings_sen: Sequence[str],
    impression_sen: Sequence[str],
    *,
    max_text_len: int = 250,
    sent_level: bool = True,
    fragment_separator: FragmentSeparator = "blank",
    rng: random.Random | None = None,
) -> ReportEncoding:
    """Tokenise a report and record which token belongs to which sentence (spec pretraining 3.3).

    Args:
        tokenizer: a transformers fast tokenizer.
        findings_sen: comma fragments of the findings (not changed).
        impression_sen: comma fragments of the impression (not changed).
        max_text_len: L.
        sent_level: draw one sentence of each fragment; otherwise keep them all.
        fragment_separator: ``blank`` joins by one blank, so that the index never drifts, drops blank fragments and cuts
            the last sentence to its visible tokens, keeping [SEP]; ``none_reference`` is the published behaviour.
        rng: draws the sentence; only consulted where a fragment holds several.

    Raises:
        ValueError: unknown separator, or no room for a token.
    """
    if fragment_separator not in ("blank", "none_reference"):
        raise ValueError(f"fragment_separator must be 'blank' or 'none_reference', got {fragment_separator!r}")
    if max_text_len < 3:
        raise ValueError(f"max_text_len must be at least 3, got {max_text_len}")
    draw = rng or random.Random(0)
    texts = [_choose_sentence(fragment, sent_level, draw) for fragment in (*findings_sen, *impression_sen)]
    if fragment_separator == "none_reference":
        return _encode_reference(tokenizer, texts, max_text_len)
    return _encode_joined(tokenizer, [text for text in texts if _holds_text(text)], max_text_len)


def whole_fragments(fragments: Sequence[str]) -> list[str]:
    """Return the texts that stand for these fragments when no sentence is drawn: lower-cased, blank ones dropped."""
    texts = (_choose_sentence(fragment, False, random.Random(0)) for fragment in fragments)
    return [text for text in texts if _holds_text(text)]


def _holds_text(fragment: str) -> bool:
    return bool(fragment.strip()) and fragment.strip().lower() not in _MISSING_FRAGMENT


def _choose_sentence(fragment: str, sent_level: bool, rng: random.Random) -> str:
    sentences = split_into_sentences(fragment.lower())
    if not sentences:
        return fragment
    if not sent_level:
        return " ".join(sentences)
    return sentences[0] if len(sentences) == 1 else rng.choice(sentences)


def _encode_joined(tokenizer: Any, texts: Sequence[str], max_text_len: int) -> ReportEncoding:
    """Corrected rule: the report is the concatenation of its fragments' tokens, so index and tokens cannot disagree."""
    pieces = _token_ids(tokenizer, texts)
    room = max_text_len - 2
    ids, index = [tokenizer.cls_token_id], [NO_SENTENCE]
    sentences: list[SentenceEncoding] = []
    for text, piece in zip(texts, pieces, strict=True):
        visible = piece[: room - (len(ids) - 1)]
        if not visible:
            continue
        ids += visible
        sentences.append(SentenceEncoding(text, [tokenizer.cls_token_id, *visible, tokenizer.sep_token_id]))
        index += [len(sentences)] * len(visible)
    ids.append(tokenizer.sep_token_id)
    index.append(NO_SENTENCE)
    return ReportEncoding(" ".join(texts), *_padded(tokenizer, ids, index, max_text_len), sentences, bool(sentences))


def _encode_reference(tokenizer: Any, texts: list[str], max_text_len: int) -> ReportEncoding:
    """Published rule: fragments glued without separator, counted apart, cut at the end (drift included)."""
    whole = "".join(texts)
    ids = tokenizer(whole, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    length = max(len(ids), max_text_len)
    index = np.full(length, NO_SENTENCE, dtype=np.int64)
    position = 1
    for number, piece in enumerate(_token_ids(tokenizer, texts), start=1):
        index[position : position + len(piece)] = number
        position += len(piece)
    visible = index[:max_text_len]
    last = max(int(visible.max()), 0)
    shown = texts[:last]
    if last and len(whole.split()) > max_text_len:
        shown[-1] = " ".join(shown[-1].split()[: int((visible == last).sum())])
    encoded = tokenizer(shown, truncation=True, max_length=max_text_len)["input_ids"] if shown else []
    sentences = [SentenceEncoding(text, alone) for text, alone in zip(shown, encoded, strict=True)]
    return ReportEncoding(whole, *_padded(tokenizer, ids, index.tolist(), max_text_len), sentences, bool(sentences))


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text alone, without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def _padded(
    tokenizer: Any, ids: Sequence[int], index: Sequence[int], max_text_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    input_ids = np.full(max_text_len, tokenizer.pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(max_text_len, dtype=np.int64)
    sentence_index = np.full(max_text_len, NO_SENTENCE, dtype=np.int64)
    used = min(len(ids), max_text_len)
    input_ids[:used] = ids[:used]
    attention_mask[:used] = 1
    spread = min(len(index), max_text_len)
    sentence_index[:spread] = index[:spread]
    return input_ids, attention_mask, sentence_index


def wordpiece_tokenizer_from_vocab(vocab: Sequence[str] | str | Path, *, lowercase: bool = True) -> Any:
    """Return a BERT WordPiece tokenizer (transformers, fast) from a vocabulary: tokens in id order, or a vocab.txt.

    Args:
        vocab: the tokens, or the path of a file with one token a line; must hold the five BERT special tokens.
        lowercase: lower-case and strip accents before splitting.

    Raises:
        ValueError: a special token is missing.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = Path(vocab).read_text(encoding="utf-8").split("\n") if isinstance(vocab, (str, Path)) else list(vocab)
    ids = {token: number for number, token in enumerate(tokens) if token}
    special = {name: f"[{name[:-6].upper()}]" for name in ("unk_token", "cls_token", "sep_token", "pad_token")}
    special["mask_token"] = "[MASK]"
    missing = [token for token in special.values() if token not in ids]
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
