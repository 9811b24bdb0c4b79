"""Count the tokens of a report: with a tokenizer that is on this machine, or a lower bound without one.

The Rust tokenizers are used directly: transformers would import torch, which a packer does not need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from mg3d.datasets.report_text import whole_fragments
from mg3d.errors import EnvironmentProblem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS: Final = 2
FILES: Final = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
# an ASCII word or any other run of characters; and a run of ASCII punctuation
_PIECE: Final = re.compile(r"[^\s!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]+")
_COUNTS: Final = re.compile(r"[^\W_]|[!-/:-@\[-`{-~]")


class TokenCounter(Protocol):
    """Counts tokens the way training sees them, [CLS] and [SEP] included."""

    name: str
    exact: bool

    def count(self, fragments: Sequence[str]) -> tuple[int, int]:
        """Return the number of tokens of one report and how many of them are unknown to the vocabulary."""


class WordCounter:
    """A lower bound: every word and every run of punctuation costs a tokenizer at least one token."""

    name = "words and punctuation"
    exact = False

    def count(self, fragments: Sequence[str]) -> tuple[int, int]:
        """Return the bound and 0.

        Args:
            fragments: pieces of one report.
        """
        pieces = (piece for text in whole_fragments(fragments) for piece in _PIECE.findall(text))
        return sum(bool(_COUNTS.search(piece)) for piece in pieces) + SPECIAL_TOKENS, 0


class ExactCounter:
    """The count of a tokenizer.

    Args:
        name: what the user called it.
        tokenizer: from :func:`load_tokenizer`.
        unknown_id: id of the unknown token, None when the vocabulary covers everything.
    """

    exact = True

    def __init__(self, name: str, tokenizer: Tokenizer, unknown_id: int | None) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._unknown_id = unknown_id

    def count(self, fragments: Sequence[str]) -> tuple[int, int]:
        """Return the tokens of a whole report, before truncation, and the unknown ones among them.

        Args:
            fragments: pieces of one report; each is tokenized alone, as training does it.
        """
        encoded = self._tokenizer.encode_batch(whole_fragments(fragments), add_special_tokens=False)
        total = sum(len(piece) for piece in encoded)
        unknown = sum(piece.ids.count(self._unknown_id) for piece in encoded) if self._unknown_id is not None else 0
        return total + SPECIAL_TOKENS, unknown


def make_counter(name_or_dir: str | None) -> TokenCounter:
    """Return the counter of a tokenizer, or the lower bound when none is named.

    Args:
        name_or_dir: hub id whose files are in the local cache, or a directory.

    Raises:
        EnvironmentProblem: the tokenizer is not on this machine, or damaged.
    """
    if name_or_dir is None:
        return WordCounter()
    files = _find_files(name_or_dir)
    try:
        tokenizer, unknown = load_tokenizer(files)
    except EnvironmentProblem:
        raise
    except Exception as problem:  # the Rust library raises bare Exception
        remedy = "copy the tokenizer again, or leave --tokenizer out"
        raise EnvironmentProblem(f"tokenizer {name_or_dir} cannot be read ({problem})", remedy) from problem
    return ExactCounter(name_or_dir, tokenizer, tokenizer.token_to_id(unknown) if unknown else None)


def _find_files(name_or_dir: str) -> dict[str, Path]:
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return {name: folder / name for name in FILES if (folder / name).is_file()}
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = {name: try_to_load_from_cache(name_or_dir, name) for name in FILES}
    except HFValidationError:
        cached = {}
    return {name: Path(place) for name, place in cached.items() if isinstance(place, str)}


def load_tokenizer(files: dict[str, Path]) -> tuple[Tokenizer, str]:
    """Build a tokenizer from its files.

    Args:
        files: those of :data:`FILES` that exist.

    Returns:
        the tokenizer, without truncation and padding, and its unknown token ("" when it has none).

    Raises:
        EnvironmentProblem: neither ``tokenizer.json`` nor a vocabulary is among them.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    settings = json.loads(files["tokenizer_config.json"].read_text("utf-8")) if "tokenizer_config.json" in files else {}
    if "tokenizer.json" in files:
        tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, _token_text(settings.get("unk_token")) or getattr(tokenizer.model, "unk_token", None) or ""
    if "vocab.txt" in files:
        unknown = _token_text(settings.get("unk_token")) or "[UNK]"
        tokenizer = Tokenizer(models.WordPiece.from_file(str(files["vocab.txt"]), unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer, unknown
    if "vocab.json" in files and "merges.txt" in files:
        tokenizer = Tokenizer(models.BPE.from_file(str(files["vocab.json"]), str(files["merges.txt"])))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, ""
    raise EnvironmentProblem(
        "the tokenizer is not on this machine: no tokenizer.json, vocab.txt or vocab.json with merges.txt",
        "give the folder that holds them, or leave --tokenizer out for a lower bound",
    )


def _token_text(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token or "")
