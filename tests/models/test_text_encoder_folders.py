"""Text-encoder folders that are damaged, hostile or do not fit: one message with folder, key and what to do."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import make_job
from transformers import AutoConfig, AutoModel

from mg3d import load_model
from mg3d.errors import ConfigError, MG3DError
from mg3d.models.finetune.text_classifier import ClassifierOptions, ReportLabeller
from mg3d.models.language_encoders import BertTextEncoder, create_text_encoder, create_tokenizer
from mg3d.models.language_encoders.checks import MODEL_TYPES, check_architecture, check_vocabulary
from mg3d.phantoms.text_encoder import write_text_encoder
from tests.inference.tiny_weights import checkpoint, volumes

TEXTS = ["no pleural effusion is seen", "the heart is enlarged"]
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text_encoder(tmp_path / "text", TEXTS, seed=1)
    return tmp_path / "text"


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values))


def refused(enter: Callable[[], object], *parts: str) -> None:
    with pytest.raises(MG3DError) as caught:
        enter()
    told = str(caught.value)
    assert caught.value.exit_code == 2 and caught.value.remedy and len(told.splitlines()) <= 5
    for part in parts:
        assert part in told, told


CONFIGS: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": 10**6},
    "num_hidden_layers": {"num_hidden_layers": -3},
    "num_hidden_layers=1000000": {"num_hidden_layers": 10**6},
    "num_attention_heads": {"num_attention_heads": 7},
    "num_attention_heads=0": {"num_attention_heads": 0},
    "vocab_size": {"vocab_size": "many"},
    "vocab_size=True": {"vocab_size": True},
    "intermediate_size": {"intermediate_size": 1.5},
    "num_labels": {"num_labels": 10**9},
    "billion numbers": {"hidden_size": 16384, "num_attention_heads": 1, "num_hidden_layers": 128},
    "pad_token_id": {"pad_token_id": 10**6},
    "layer_norm_eps": {"layer_norm_eps": "small"},
    "_attn_implementation": {"_attn_implementation": "kernels-community/flash-attn"},
    "attn_implementation": {"attn_implementation": "someone/kernels:flash"},
    "_attn_implementation_internal": {"text_config": {"vision": {"_attn_implementation_internal": "a/b"}}},
    "flash_attention_2": {"_attn_implementation": "flash_attention_2"},
    "quantization_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "transformers_weights": {"transformers_weights": "../other.safetensors"},
    "gpt2": {"model_type": "gpt2"},
    "roberta-prelayernorm": {"model_type": "roberta-prelayernorm"},
    "['bert']": {"model_type": ["bert"]},
}


@pytest.mark.parametrize("word", CONFIGS)
@pytest.mark.parametrize("random_init", [False, True])
def test_a_config_that_is_none_is_refused_with_its_key(folder: Path, word: str, random_init: bool) -> None:
    change(folder, **CONFIGS[word])
    refused(lambda: create_text_encoder(str(folder), random_init=random_init), str(folder), word)


@pytest.mark.parametrize("word", CONFIGS)
def test_what_a_checkpoint_says_about_its_text_encoder_is_judged_alike(tmp_path: Path, word: str) -> None:
    good = torch.load(checkpoint(tmp_path), weights_only=True)
    described = good["mg3d_metadata"]["text_encoder_config"] | CONFIGS[word]
    torch.save(
        good | {"mg3d_metadata": good["mg3d_metadata"] | {"text_encoder_config": described}}, tmp_path / "w.ckpt"
    )
    refused(lambda: load_model(tmp_path / "w.ckpt"), word)


@pytest.mark.parametrize("values", [{"hidden_act": "no_such"}, {"hidden_act": 3}])
def test_whatever_transformers_raises_becomes_one_message(folder: Path, values: dict[str, Any]) -> None:
    change(folder, **values)
    refused(lambda: create_text_encoder(str(folder), random_init=True), str(folder))
    refused(lambda: create_text_encoder(str(folder)), str(folder))


@pytest.mark.parametrize("error", [ImportError("x"), AttributeError("x"), MemoryError(), RecursionError()])
def test_no_kind_of_error_escapes(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    refused(lambda: create_text_encoder(str(folder)), type(error).__name__)


@pytest.mark.parametrize("text", ["<html>", "[1]", "[" * 10**6, '{"a":' * 10**5, "", "\x00\x01"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_json_that_is_none_is_refused(folder: Path, text: str, file: str) -> None:
    (folder / file).write_text(text)
    refused(lambda: create_tokenizer(str(folder)), str(folder))
    if file == "config.json":
        refused(lambda: create_text_encoder(str(folder)), str(folder))


def test_a_program_that_comes_with_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    program = f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\n"
    for name in ("modeling_own", "tokenization_own", "configuration_own"):
        (folder / f"{name}.py").write_text(program)
    maps = {"AutoModel": "modeling_own.Own", "AutoConfig": "configuration_own.Own"}
    change(folder, auto_map=maps, trust_remote_code=True)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    assert isinstance(create_text_encoder(str(folder)), BertTextEncoder)
    assert len(create_tokenizer(str(folder))) > 5
    change(folder, model_type="own")
    refused(lambda: create_text_encoder(str(folder)), "model_type='own'")
    (folder / "config.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    try:
        create_tokenizer(str(folder))
    except MG3DError as error:
        assert error.exit_code == 2
    assert not (tmp_path / "marker").exists()


def test_an_adapter_is_refused_because_it_names_another_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    refused(lambda: create_text_encoder(str(folder)), "adapter_config.json", str(folder))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_pickled_weights_are_read_as_tensors_or_refused(folder: Path, tmp_path: Path) -> None:
    want = create_text_encoder(str(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(want, folder / "pytorch_model.bin")
    got = create_text_encoder(str(folder)).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in got.items())
    bad: dict[str, Callable[[Path], object]] = {
        "reduce": lambda path: torch.save(want | {"x": Evil(tmp_path / "marker")}, path),
        "bare": lambda path: path.write_bytes(pickle.dumps(Evil(tmp_path / "marker"))),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-500]),
        "page": lambda path: path.write_text("<html>quota</html>"),
    }
    for kind, write in bad.items():
        torch.save(want, folder / "pytorch_model.bin")
        write(folder / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin") as caught:
            create_text_encoder(str(folder))
        assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value), kind
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", sorted(set(MODEL_TYPES) - {"cxr-bert"}))
def test_every_accepted_model_type_gives_what_the_whole_model_gives(kind: str) -> None:
    more = {"embedding_size": 16} if kind in ("electra", "albert") else {}
    torch.manual_seed(0)
    whole = AutoModel.from_config(AutoConfig.for_model(kind, max_position_embeddings=40, **SIZES, **more)).eval()
    check_architecture(json.loads(whole.config.to_json_string()), kind)
    encoder, mask = BertTextEncoder(whole), torch.ones(2, 12, dtype=torch.long)
    ids = torch.randint(5, 50, (2, encoder.max_length))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        want = whole(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(encoder(ids, mask)[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(ids, mask)[1, :7], want[1, :7], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- tokenizers
def without(folder: Path, token: str) -> None:
    """The special token is neither a word nor named."""
    path = folder / "vocab.txt"
    path.write_text(path.read_text(encoding="utf-8").replace(f"[{token.upper()}]\n", f"[unused-{token}]\n"))
    change(folder, "tokenizer_config.json", **{f"{token}_token": None})


@pytest.mark.parametrize("token", ["pad", "unk", "cls", "sep", "mask"])
def test_a_tokenizer_without_a_special_token_is_refused_by_its_name(folder: Path, token: str) -> None:
    without(folder, token)
    refused(lambda: create_tokenizer(str(folder)), str(folder), token)


def tokens_of(folder: Path) -> list[str]:
    return (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()


def test_a_token_that_is_named_and_not_in_the_vocabulary_has_no_embedding(folder: Path) -> None:
    path = folder / "vocab.txt"
    path.write_text(
        path.read_text(encoding="utf-8").replace("[MASK]\n", "[unused]\n")
    )  # transformers gives it the next free id
    refused(lambda: create_tokenizer(str(folder)), str(folder), "[MASK]")


def test_more_tokens_than_embeddings_are_refused_with_both_counts(folder: Path) -> None:
    rows = len(tokens_of(folder))
    (folder / "vocab.txt").write_text("\n".join([*tokens_of(folder), "newword", "other"]) + "\n")
    refused(lambda: create_tokenizer(str(folder)), str(folder), "2 tokens more", str(rows), "newword")
    (folder / "config.json").unlink()  # a tokenizer alone cannot know; whoever has the encoder asks
    tokenizer = create_tokenizer(str(folder))
    refused(lambda: check_vocabulary(tokenizer, rows, "here"), "newword")


@pytest.mark.parametrize(("name", "token"), [("mask_token", "[PAD]"), ("sep_token", "[CLS]"), ("pad_token", "[UNK]")])
def test_one_entry_for_two_special_tokens_is_refused(folder: Path, name: str, token: str) -> None:
    change(folder, "tokenizer_config.json", **{name: token})
    refused(lambda: create_tokenizer(str(folder)), str(folder), token)


def test_a_padding_id_that_is_not_the_encoders_is_refused(folder: Path) -> None:
    change(folder, pad_token_id=3)
    refused(lambda: create_tokenizer(str(folder)), str(folder), "pad_token_id=3")


def test_a_vocabulary_without_words_is_refused(folder: Path) -> None:
    for text in ("", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"):
        (folder / "vocab.txt").write_text(text)
        refused(lambda: create_tokenizer(str(folder)), str(folder))


def test_chat_templates_are_dropped_since_their_names_become_files(folder: Path, tmp_path: Path) -> None:
    change(folder, "tokenizer_config.json", chat_template=[{"name": "../../escaped", "template": "x"}])
    try:
        create_tokenizer(str(folder)).save_pretrained(tmp_path / "saved" / "here")
    except MG3DError as error:
        assert error.exit_code == 2
    assert not list(tmp_path.rglob("*escaped*"))


def test_zero_shot_refuses_a_tokenizer_that_does_not_fit_the_weights(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run")
    for name, fault in (("mask", "mask"), ("words", "has 1 tokens more")):
        other = tmp_path / name
        write_text_encoder(other, TEXTS, seed=1)
        (other / "config.json").unlink()
        ids = create_tokenizer(str(run.parent / "text")).get_vocab()
        ordered = sorted(ids, key=ids.__getitem__)
        (other / "vocab.txt").write_text("\n".join([*ordered, "more"] if name == "words" else ordered) + "\n")
        if name == "mask":
            without(other, "mask")
        model = load_model(run, tokenizer=other)
        refused(lambda model=model: model.zero_shot(volumes(1), ["effusion"]), str(other), fault)


def test_the_report_classifier_refuses_a_folder_with_a_bad_encoder(folder: Path, tmp_path: Path) -> None:
    options = ClassifierOptions(findings=("effusion",), max_length=16)
    ReportLabeller.create(str(folder), options).save(tmp_path / "best")
    assert ReportLabeller.load(tmp_path / "best").label(TEXTS).shape == (2, 1)
    change(tmp_path / "best" / "encoder", _attn_implementation="someone/kernel")
    refused(lambda: ReportLabeller.load(tmp_path / "best"), "someone/kernel", str(tmp_path / "best"))
    refused(lambda: ReportLabeller.create(str(tmp_path / "best" / "encoder"), options), "someone/kernel")


@pytest.mark.slow
def test_main_py_refuses_them_before_training(repository: Path, tmp_path: Path) -> None:
    words = make_job(tmp_path / "job")
    cases: dict[str, Callable[[Path], None]] = {
        "mask": lambda place: without(place, "mask"),
        "kernel": lambda place: change(place, _attn_implementation="kernels-community/flash-attn"),
        "layers": lambda place: change(place, num_hidden_layers=-1),
        "deep": lambda place: (place / "config.json").write_text("[" * 10**6) and None,
    }
    for name, spoil in cases.items():
        place = tmp_path / name
        write_text_encoder(place, TEXTS, seed=1)
        spoil(place)
        command = [sys.executable, "main.py", "with", "task_pretrain_mg3d", "tiny", *words, f"tokenizer={place}"]
        more = ["max_steps=1", "num_gpus=0", f"log_dir={tmp_path / 'out'}", "vocab_size=None", "evaluate=False"]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, *more], cwd=repository, env=environ, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, (name, done.stderr[-2000:])
        assert str(place) in done.stderr and "mend:" in done.stderr, (name, done.stderr[-2000:])


@pytest.mark.slow
def test_a_hub_that_takes_the_call_and_never_answers_is_given_up(repository: Path, tmp_path: Path) -> None:
    words = make_job(tmp_path / "job")
    training = ["main.py", "with", "task_pretrain_mg3d", "tiny", *words, "tokenizer=mg3d-tests/not-a-model"]
    training += ["max_steps=1", "num_gpus=0", f"log_dir={tmp_path / 'out'}", "vocab_size=None", "evaluate=False"]
    loading = "import sys\nfrom mg3d import load_model\nfrom mg3d.errors import MG3DError\n"
    loading += "try:\n    load_model('mg3d-tests/not-a-model')\nexcept MG3DError as error:\n    sys.exit(str(error))"
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(16)
        environ = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environ.pop(switch, None)
        environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}", "HF_HOME": str(tmp_path / "cache")}
        environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(repository)}
        for command, code in ((training, 2), (["-c", loading], 1)):
            done = subprocess.run(
                [sys.executable, *command],
                cwd=repository,
                env=environ,
                capture_output=True,
                encoding="utf-8",
                check=False,
                timeout=300,
            )
            assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-2000:]
            assert "did not answer within" in done.stderr and "local" in done.stderr
