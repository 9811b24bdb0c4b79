"""What a text-encoder folder must hold before anything of it is built: architecture, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.errors import CheckpointError, ConfigError, EnvironmentProblem
from mg3d.models.bounds import MAX_MODEL_GIB, Bound, check_values, read_json_object

__all__ = [
    "OFFSET_POSITIONS",
    "check_architecture",
    "check_folder",
    "check_tokenizer",
    "check_vocabulary",
    "read_tokenizer_folder",
]

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose first position is the one after the padding id."""

MODEL_TYPES = ("bert", "cxr-bert", *OFFSET_POSITIONS, "albert", "ernie", "megatron-bert", "electra")
"""Model types whose embedding layer and encoder together are the whole model, as :class:`BertTextEncoder` runs them."""

ATTENTION = ("eager", "sdpa")
"""Attention that comes with torch; any other name makes transformers look for a package, or for code on the hub."""

SPECIAL_TOKENS = ("pad", "unk", "cls", "sep", "mask")

_SIZES: Mapping[str, Bound] = {
    "vocab_size": Bound(1, 2_000_000),
    "hidden_size": Bound(1, 16384),
    "embedding_size": Bound(1, 16384),
    "num_hidden_layers": Bound(1, 128),
    "num_attention_heads": Bound(1, 1024),
    "intermediate_size": Bound(1, 131072),
    "max_position_embeddings": Bound(1, 131072),
    "type_vocab_size": Bound(1, 1024),
    "num_labels": Bound(0, 100_000),
    "chunk_size_feed_forward": Bound(0, 131072),
    "hidden_dropout_prob": Bound(0, 1, whole=False),
    "attention_probs_dropout_prob": Bound(0, 1, whole=False),
    "layer_norm_eps": Bound(0, 1, whole=False),
    "initializer_range": Bound(0, 10, whole=False),
}
_REFUSED: Mapping[str, str] = {
    "quantization_config": "use the weights before quantisation",
    "transformers_weights": "put the weights into the folder as model.safetensors",
}
_ADAPTER = "adapter_config.json"


def check_architecture(config: Mapping[str, Any], place: str) -> None:
    """Refuse the description of a text encoder that is none, or that would load code or immense weights.

    Args:
        config: content of ``config.json``, or what a checkpoint records of it.
        place: folder or file, for the message.

    Raises:
        ConfigError: the message names the key.
    """
    where = f"text encoder {place}: config.json"
    kind = config.get("model_type", "bert")
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"{where}: model_type={str(kind)[:40]!r} is no encoder that fits", f"use one of {', '.join(MODEL_TYPES)}"
        )
    _check_attention(config, where)
    for key, mend in _REFUSED.items():
        if config.get(key):
            raise ConfigError(f"{where}: {key} is not supported", mend)
    try:
        check_values(config, _SIZES, where)
    except CheckpointError as error:
        raise ConfigError(error.message, error.remedy) from error
    width, heads = config.get("hidden_size", 768), config.get("num_attention_heads", 12)
    if width % heads:
        raise ConfigError(
            f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}", "use the original file"
        )
    if kind == "electra" and config.get("embedding_size", 128) != width:
        raise ConfigError(f"{where}: embedding_size is not hidden_size={width}", "use a BERT or RoBERTa model")
    _check_padding(config, where)
    _check_total(config, where)


def _check_attention(config: Any, where: str, depth: int = 0) -> None:
    """Only known kinds of attention, in nested configs too."""
    if depth > 20:
        raise ConfigError(f"{where} is nested too deeply", "use the original file")
    for key, value in config.items():
        if "attn_implementation" in str(key) and value is not None and value not in ATTENTION:
            raise ConfigError(
                f"{where}: {str(key)[:40]}={str(value)[:60]!r} is not known",
                f"leave it out, or write one of {', '.join(ATTENTION)}; code from a hub is never loaded",
            )
        if isinstance(value, Mapping):
            _check_attention(value, where, depth + 1)


def _check_padding(config: Mapping[str, Any], where: str) -> None:
    padding, entries = config.get("pad_token_id"), config.get("vocab_size", 30522)
    if padding is not None and (type(padding) is not int or not 0 <= padding < entries):
        raise ConfigError(
            f"{where}: pad_token_id={str(padding)[:40]} is outside of the vocabulary of {entries}",
            "write the id of the padding token",
        )


def _check_total(config: Mapping[str, Any], where: str) -> None:
    width, inner = config.get("hidden_size", 768), config.get("intermediate_size", 3072)
    rows = config.get("vocab_size", 30522) + config.get("max_position_embeddings", 512)
    total = rows * width + config.get("num_hidden_layers", 12) * (4 * width + 2 * inner) * width
    if 4 * total > MAX_MODEL_GIB * 2**30:
        raise ConfigError(
            f"{where}: hidden_size, num_hidden_layers and vocab_size make a model of {total / 1e9:.3g} billion numbers",
            f"at most {MAX_MODEL_GIB:g} GiB are built",
        )


def check_folder(folder: Path, remedy: str, *, weights: bool) -> None:
    """Refuse a text-encoder folder by its files, before transformers reads them.

    Args:
        folder: the folder, with ``config.json``.
        remedy: what to do where a file is missing or damaged.
        weights: its weights are going to be used as well.

    Raises:
        EnvironmentProblem: no ``config.json``, or a damaged one.
        ConfigError: a config that :func:`check_architecture` refuses, an adapter, or pickled weights that hold more
            than tensors.
    """
    check_architecture(read_json_object(folder / "config.json", EnvironmentProblem, remedy), str(folder))
    if (folder / _ADAPTER).exists():
        raise ConfigError(
            f"text encoder {folder}: {_ADAPTER} names another model as its base", "merge the adapter into the model"
        )
    if not weights or any(folder.glob("*.safetensors")):
        return
    from mg3d.models.safe_reading import read_torch

    for file in sorted(folder.glob("pytorch_model*.bin")):
        try:
            read_torch(file)
        except CheckpointError as error:
            raise ConfigError(f"text encoder: {error.message}", "save it with safetensors (save_pretrained)") from error


def check_tokenizer(tokenizer: Any, place: str, config: Mapping[str, Any] | None = None) -> None:
    """Refuse a tokenizer that training or evaluation could not use.

    Args:
        tokenizer: a transformers tokenizer.
        place: its folder or hub id, for the message.
        config: architecture of the text encoder that belongs to it, where it is at hand.

    Raises:
        ConfigError: no words, a special token that is missing, outside of the vocabulary or the same as another, or
            ids that the encoder has no embedding for.
    """
    words = tokenizer.get_vocab()
    ids: dict[str, int] = {}
    for name in SPECIAL_TOKENS:
        token, number = getattr(tokenizer, f"{name}_token", None), getattr(tokenizer, f"{name}_token_id", None)
        if token is None or number is None:
            raise ConfigError(
                f"the tokenizer in {place} has no {name} token",
                f"name it in tokenizer_config.json ({name}_token) and in the vocabulary",
            )
        twin = next((other for other, used in ids.items() if used == number), None)
        if twin:
            raise ConfigError(
                f"the tokenizer in {place} uses {str(token)[:40]!r} (id {number}) as {twin} and as {name} token",
                "give each its own entry of the vocabulary",
            )
        if words.get(str(token)) != number or number < 0:
            raise ConfigError(
                f"the {name} token {str(token)[:40]!r} (id {number}) of {place} is not in the vocabulary",
                "add it to the vocabulary, or name the right one in tokenizer_config.json",
            )
        ids[name] = number
    if len(words) <= len(set(tokenizer.all_special_ids)):
        raise ConfigError(
            f"the vocabulary in {place} has no words", "copy or download vocab.txt or tokenizer.json again"
        )
    if config:
        _check_against(config, ids["pad"], place)
        check_vocabulary(tokenizer, int(config.get("vocab_size", 30522)), place)


def _check_against(config: Mapping[str, Any], padding: int, place: str) -> None:
    stated = config.get("pad_token_id")
    if stated is not None and stated != padding:
        raise ConfigError(
            f"{place}: the pad token has id {padding}, config.json says pad_token_id={stated}",
            "use the vocabulary and the config.json of one model",
        )


def check_vocabulary(tokenizer: Any, rows: int, place: str) -> None:
    """Refuse a tokenizer with ids that the text encoder has no embedding for.

    Args:
        tokenizer: a transformers tokenizer.
        rows: rows of the embedding table.
        place: the tokenizer's folder or hub id, for the message.

    Raises:
        ConfigError: the message names the first token without a row.
    """
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise ConfigError(
            f"the tokenizer in {place} has {len(beyond)} tokens more than the {rows} embeddings of the text encoder, "
            f"first {token[:40]!r} (id {number})",
            "use the vocabulary that the text encoder was trained with",
        )


def read_tokenizer_folder(folder: Path, remedy: str) -> dict[str, Any] | None:
    """Check the JSON files of a tokenizer before transformers reads them.

    Args:
        folder: the folder.
        remedy: what to do where a file is damaged.

    Returns:
        The architecture of the text encoder in the same folder, if there is one.

    Raises:
        EnvironmentProblem: a file that is too large, nested too deeply, or no JSON object.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json_object(folder / name, EnvironmentProblem, remedy)
    if not (folder / "config.json").is_file():
        return None
    found = read_json_object(folder / "config.json", EnvironmentProblem, remedy)
    if "vocab_size" not in found:
        return None
    check_architecture(found, str(folder))
    return found
