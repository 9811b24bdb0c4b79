from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from mg3d.errors import ConfigError, EnvironmentProblem
from mg3d.models.language_encoders import BertTextEncoder, create_text_encoder, create_tokenizer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


@pytest.fixture
def bert_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def text() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def test_both_halves_together_equal_the_whole_model(bert_dir: Path, text: tuple) -> None:
    ids, mask = text
    encoder = create_text_encoder(str(bert_dir))
    whole = BertModel.from_pretrained(bert_dir, attn_implementation="eager").eval()
    with torch.no_grad():
        want = whole(input_ids=ids, attention_mask=mask).last_hidden_state
    got = encoder.contextualize(encoder.embed(ids), mask)
    assert got.shape == (3, 12, encoder.embed_dim)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, :7], want[1, :7], rtol=1e-4, atol=1e-5)


def test_every_sample_keeps_its_own_place_and_padding_has_no_influence(bert_dir: Path, text: tuple) -> None:
    ids, mask = text
    encoder = create_text_encoder(str(bert_dir))
    other = ids.clone()
    other[1, 7:] = 3
    together, alone = encoder(ids, mask), torch.cat([encoder(ids[k : k + 1], mask[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(other, mask)[1, :7], together[1, :7], rtol=1e-4, atol=1e-5)


def test_a_report_without_any_token_stays_finite(bert_dir: Path, text: tuple) -> None:
    encoder = create_text_encoder(str(bert_dir))
    assert torch.isfinite(encoder(text[0], torch.zeros_like(text[1]))).all()


def test_state_names_are_the_published_ones_and_old_buffers_load(bert_dir: Path) -> None:
    encoder = create_text_encoder(str(bert_dir))
    state = encoder.state_dict()
    assert "embeddings.word_embeddings.weight" in state
    assert "encoder.layer.1.attention.self.query.weight" in state
    assert "pooler.dense.bias" in state
    encoder.load_state_dict(state | {"embeddings.position_ids": torch.arange(20)[None]}, strict=True)


def test_frozen_encoder_has_no_gradient_and_no_dropout_while_the_rest_trains(bert_dir: Path, text: tuple) -> None:
    encoder = create_text_encoder(str(bert_dir), drop_rate=0.5)
    torch.nn.ModuleList([encoder]).train()
    assert not encoder.training and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder(*text), encoder(*text))


@pytest.mark.parametrize(("frozen", "eval_mode"), [(True, False), (False, True), (False, False)])
def test_dropout_acts_in_the_published_mode_and_when_trainable(
    bert_dir: Path, text: tuple, frozen: bool, eval_mode: bool
) -> None:
    encoder = create_text_encoder(str(bert_dir), drop_rate=0.5, frozen=frozen, eval_mode=eval_mode).train()
    assert not torch.equal(encoder(*text), encoder(*text))
    assert all(p.requires_grad != frozen for p in encoder.parameters())
    encoder.eval()
    assert torch.equal(encoder(*text), encoder(*text))


def test_random_init_needs_only_the_config_and_follows_the_seed(bert_dir: Path) -> None:
    (bert_dir / "model.safetensors").unlink()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create_text_encoder(str(bert_dir), random_init=True).state_dict())
    key = "encoder.layer.0.output.dense.weight"
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_roberta_takes_the_same_road(tmp_path: Path, text: tuple) -> None:
    config = RobertaConfig(**(SIZES | {"max_position_embeddings": 22}), pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path)
    ids, mask = text
    encoder = create_text_encoder(str(tmp_path))
    whole = RobertaModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = whole(input_ids=ids, attention_mask=torch.ones_like(mask)).last_hidden_state
    torch.testing.assert_close(encoder(ids, torch.ones_like(mask)), want, rtol=1e-4, atol=1e-5)
    assert encoder.max_length == 20


def test_bfloat16_autocast(bert_dir: Path, text: tuple) -> None:
    encoder = create_text_encoder(str(bert_dir))
    exact = encoder(*text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder(*text)
    assert float((rough.float() - exact).abs().max()) < 0.2


def test_real_weights_give_the_recorded_embeddings(reference_dir: Path, real_bert: Path) -> None:
    want = json.loads((reference_dir / "expected" / "bert_minilm_embeddings.json").read_text(encoding="utf-8"))
    encoder, tokenizer = create_text_encoder(str(real_bert)), create_tokenizer(str(real_bert))
    batch = tokenizer(
        want["sentences"], padding="max_length", truncation=True, max_length=want["max_length"], return_tensors="pt"
    )
    assert batch["input_ids"].tolist() == want["input_ids"]
    hidden = encoder(batch["input_ids"], batch["attention_mask"])
    weights = batch["attention_mask"][..., None] / batch["attention_mask"].sum(1)[:, None, None]
    pooled = torch.nn.functional.normalize((hidden * weights).sum(1), dim=-1)
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(hidden[:, 0, :8], torch.tensor(want["cls_first8"]), **close)
    torch.testing.assert_close(encoder.pooler(hidden)[:, :8], torch.tensor(want["pooler_first8"]), **close)
    torch.testing.assert_close(pooled[:, :8], torch.tensor(want["meanpool_norm_first8"]), **close)
    torch.testing.assert_close(pooled @ pooled.T, torch.tensor(want["meanpool_cosine"]), **close)


def test_vocabulary_file_alone_makes_a_tokenizer(tmp_path: Path, real_bert: Path) -> None:
    shutil.copy(real_bert / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    tokenizer = create_tokenizer(str(tmp_path))
    ids = tokenizer("Heart size is increased.")["input_ids"]
    assert (ids[0], ids[-1], tokenizer.pad_token_id, tokenizer.mask_token_id) == (101, 102, 0, 103)
    assert len(tokenizer) == 30522


def test_an_incomplete_directory_is_named(tmp_path: Path, bert_dir: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="does not exist"):
        create_text_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(EnvironmentProblem, match="no tokenizer"):
        create_tokenizer(str(bert_dir))
    (bert_dir / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(EnvironmentProblem, match="bert"):
        create_text_encoder(str(bert_dir))
    (bert_dir / "config.json").write_text("<html>")
    with pytest.raises(EnvironmentProblem, match="tokenizer=<local directory>"):
        create_text_encoder(str(bert_dir))


def test_weights_of_another_depth_are_refused(bert_dir: Path) -> None:
    config = json.loads((bert_dir / "config.json").read_text(encoding="utf-8"))
    (bert_dir / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"layer\.2"):
        create_text_encoder(str(bert_dir))


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="no embeddings"):
        BertTextEncoder(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("create", [create_text_encoder, create_tokenizer])
def test_an_unreachable_hub_is_reported_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, create) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("mg3d.models.language_encoders.registry.HUB_DEADLINE_S", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    with pytest.raises(EnvironmentProblem, match=r"(?s)hub.*local directory"):
        create("mg3d-tests/not-a-model")


def test_offline_mode_never_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mg3d.models.language_encoders.registry._probe_hub", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    with pytest.raises(EnvironmentProblem, match="local cache"):
        create_text_encoder("mg3d-tests/not-a-model")


def test_a_name_that_cannot_be_a_hub_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
        create_text_encoder("not a name!")
