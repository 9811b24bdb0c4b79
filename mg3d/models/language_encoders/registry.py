"""Text encoders and tokenizers by hub id or local directory, with quick and clear refusals when offline."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.errors import ConfigError, EnvironmentProblem, MG3DError
from mg3d.models.language_encoders.bert import BertTextEncoder
from mg3d.models.language_encoders.checks import (
    check_architecture,
    check_folder,
    check_tokenizer,
    read_tokenizer_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HUB_DEADLINE_S = 4.0
"""Seconds the hub gets to answer at all."""

PROGRAM_OF_BERT, TOKENIZER_OF_BERT = "cxr-bert", "CXRBertTokenizer"
"""Names under which a plain BERT and its tokenizer are stored with a program of their own."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")


def create_text_encoder(
    name_or_dir: str,
    *,
    random_init: bool = False,
    drop_rate: float | None = 0.1,
    frozen: bool = True,
    eval_mode: bool = True,
) -> BertTextEncoder:
    """Build a BERT-like text encoder.

    Args:
        name_or_dir: hub id, or local directory with ``config.json`` and the weights.
        random_init: take only the architecture from ``config.json``; weights come from the global torch generator.
        drop_rate: dropout of the encoder while in train mode; None keeps the model's own.
        frozen: switch gradients off.
        eval_mode: keep a frozen encoder in eval mode.

    Returns:
        The encoder, on the CPU, in float32.

    Raises:
        EnvironmentProblem: the directory is incomplete, or the hub and its cache do not have the model.
        ConfigError: the model is not BERT-like, its sizes are impossible, its weights do not cover the architecture, or
            hold more than tensors.
    """
    from transformers import AutoModel

    source, options = _locate(name_or_dir)
    if Path(source).is_dir():
        check_folder(Path(source), _local_mend(name_or_dir), weights=not random_init)
    config = _guarded(name_or_dir, _read_config, source, **options)
    if drop_rate is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = drop_rate
    if random_init:
        model = _guarded(name_or_dir, lambda _: AutoModel.from_config(config), source)
        return BertTextEncoder(model, frozen=frozen, eval_mode=eval_mode)
    with _no_progress_bars():
        model, info = _guarded(
            name_or_dir, AutoModel.from_pretrained, source, config=config, output_loading_info=True, **options
        )
    _check_coverage(name_or_dir, info)
    return BertTextEncoder(model.float(), frozen=frozen, eval_mode=eval_mode)


def create_tokenizer(name_or_dir: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text encoder.

    Args:
        name_or_dir: hub id, or local directory with ``tokenizer.json`` or ``vocab.txt``.

    Raises:
        EnvironmentProblem: the directory is incomplete, or the hub and its cache do not have the tokenizer.
        ConfigError: special tokens or words are missing, or do not fit the text encoder in the same directory.
    """
    source, options = _locate(name_or_dir, probe="tokenizer_config.json")
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in _TOKENIZER_FILES):
        raise EnvironmentProblem(f"{source} holds no tokenizer", f"put {' or '.join(_TOKENIZER_FILES[:2])} into it")
    beside = read_tokenizer_folder(Path(source), _local_mend(name_or_dir)) if Path(source).is_dir() else None
    tokenizer = _guarded(name_or_dir, _read_tokenizer, source, **options)
    check_tokenizer(tokenizer, name_or_dir, beside or _config_of_hub(source, **options))
    tokenizer.chat_template = None  # of no use here, and its names become file names when a tokenizer is saved
    return tokenizer


def _read_config(source: str, **options: Any) -> Any:
    """Architecture of an encoder; programs that come with it are never run.

    CXR-BERT brings a program of its own for what is a plain BERT, and is read as one.
    """
    from transformers import AutoConfig, BertConfig, PreTrainedConfig

    stored, _ = PreTrainedConfig.get_config_dict(source, **options)
    check_architecture(stored, source)
    _refuse_adapter(source, options)
    if stored.get("model_type") != PROGRAM_OF_BERT:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    return BertConfig(**{key: value for key, value in stored.items() if key not in ("model_type", "auto_map")})


def _config_of_hub(source: str, **options: Any) -> dict[str, Any] | None:
    """Architecture that a hub id stands for; None for a directory, or where there is none."""
    from transformers import PreTrainedConfig

    if Path(source).is_dir():
        return None
    with suppress(OSError, ValueError):
        return PreTrainedConfig.get_config_dict(source, **options)[0]
    return None


def _refuse_adapter(source: str, options: dict[str, Any]) -> None:
    """An adapter makes transformers load the model that it names instead."""
    from transformers.utils import find_adapter_config_file, is_peft_available

    if not Path(source).is_dir() and is_peft_available() and find_adapter_config_file(source, **options):
        raise ConfigError(f"{source} is an adapter of another model", "merge the adapter into the model")


def _read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, BertTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if get_tokenizer_config(source, **options).get("tokenizer_class") == TOKENIZER_OF_BERT:
        return BertTokenizer.from_pretrained(source, **options)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def encoder_revision(name_or_dir: str, config: Any = None) -> str | None:
    """What pins a text encoder and its tokenizer: the hub commit, or a digest of the small files of a directory.

    Args:
        name_or_dir: hub id or local directory.
        config: the configuration it was loaded with, which knows the hub commit.

    Returns:
        A commit, ``sha256:...``, or None if neither is known.
    """
    folder = Path(name_or_dir).expanduser()
    if not folder.is_dir():
        return getattr(config, "_commit_hash", None)
    digest = hashlib.sha256()
    for name in ("config.json", *_TOKENIZER_FILES):
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _locate(name_or_dir: str, probe: str = "config.json") -> tuple[str, dict[str, Any]]:
    """Resolve a name to a source and options of ``from_pretrained``; never waits longer than the deadline."""
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return str(path), {"local_files_only": True}
    if path.is_absolute() or name_or_dir.startswith((".", "~")) or name_or_dir.count("/") > 1 or path.exists():
        raise EnvironmentProblem(f"the text encoder directory {name_or_dir} does not exist", _local_mend(name_or_dir))
    if _is_cached(name_or_dir, probe) or hub_is_off():
        return name_or_dir, {"local_files_only": True}
    _probe_hub(name_or_dir, probe)
    return name_or_dir, {}


def hub_is_off() -> bool:
    """Whether an environment variable forbids asking the hub."""
    from huggingface_hub import constants

    switches = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return constants.HF_HUB_OFFLINE or any(value.upper() in ("1", "ON", "YES", "TRUE") for value in switches)


def _is_cached(name: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is neither a directory nor a hub id", _local_mend(name)) from error


def _probe_hub(name: str, file: str) -> None:
    ask_hub(name, file, _local_mend(name))


def ask_hub(name: str, file: str, mend: str) -> None:
    """Ask once whether the hub answers at all, in a side thread: name resolution has no time limit of its own.

    Args:
        name: hub id.
        file: a file that it must hold.
        mend: what to do without the hub.

    Raises:
        EnvironmentProblem: no answer within :data:`HUB_DEADLINE_S`, or an error.
    """
    from huggingface_hub import get_session, hf_hub_url

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            get_session().head(hf_hub_url(name, file), timeout=HUB_DEADLINE_S)
            outcome.append(None)
        except Exception as error:  # whatever the network stack raises becomes one message
            outcome.append(error)

    worker = threading.Thread(target=ask, name="hub-probe", daemon=True)
    worker.start()
    worker.join(HUB_DEADLINE_S)
    if not outcome:
        raise EnvironmentProblem(f"the hub did not answer within {HUB_DEADLINE_S:g} s for {name!r}", mend)
    if outcome[0] is not None:
        raise EnvironmentProblem(f"cannot reach the hub for {name!r}: {_first_line(outcome[0])}", mend)


def _guarded(name: str, load: Any, source: str, **options: Any) -> Any:
    """Call a loader of transformers; whatever it raises becomes one message."""
    try:
        return load(source, **options)
    except MG3DError:
        raise
    except Exception as error:  # a bad file can fail in any way
        where = "directory" if Path(source).is_dir() else "local cache" if options.get("local_files_only") else "hub"
        raise EnvironmentProblem(
            f"cannot load the text encoder {name!r} from the {where}: {_first_line(error)}", _local_mend(name)
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _check_coverage(name: str, info: dict[str, Any]) -> None:
    missing = sorted(key for key in info.get("missing_keys", ()) if not key.startswith("pooler."))
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())]
    if missing or mismatched:
        first = (missing + mismatched)[:3]
        raise ConfigError(
            f"the weights of {name!r} lack or misfit {len(missing) + len(mismatched)} tensors, e.g. {', '.join(first)}",
            "use the weights that belong to its config.json, or set text_encoder_random_init=True",
        )
    if info.get("missing_keys"):
        logger.info("text encoder %s: the pooler is not in the file and stays random (it is not used)", name)


def _local_mend(name: str) -> str:
    return (
        f"download {name!r} elsewhere (config.json, vocabulary, weights) and pass tokenizer=<local directory> "
        "(text_encoder= where texts are matched with volumes); "
        "offline, HF_HUB_OFFLINE=1 uses only the cache"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if lines and ("weights_only" in str(error) or "trust_remote_code" in str(error)):
        return "it holds more than tensors and plain values, or wants its own program to be run"
    kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__} "
    return f"{kind}{lines[0] if lines else ''}"[:200].strip() or type(error).__name__
