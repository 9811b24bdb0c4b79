from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_network import HIDDEN, VOLUME, RecordedStep, bert_config, tiny_batch, tiny_network, total_loss
from torch import Tensor
from transformers import BertModel

from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives.local_contrast import LocalContrast
from mg3d.models.objectives.masked_image import MaskedImage
from mg3d.models.optimization import build_optimizer, build_parameter_groups, parameter_group_index
from mg3d.models.options import NetworkOptions
from mg3d.models.vision_encoders import create_vision_encoder

MODES = ("projected", "encoder")


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> RecordedStep:
    return RecordedStep(golden_dir)


@pytest.fixture(scope="module", params=MODES)
def step(request: pytest.FixtureRequest, recorded: RecordedStep) -> tuple[str, MG3DNetwork, dict[str, dict]]:
    """Mode, network after the backward pass of the weighted total, and the terms."""
    net = recorded.loaded(request.param)
    terms = net(recorded.batch)
    weights = recorded.config["loss_weights"]
    torch.stack([weights[name] * out[f"{name}_loss"] for name, out in terms.items()]).sum().backward()
    return request.param, net, terms


@pytest.mark.smoke
def test_recorded_losses(step, recorded):
    mode, _, terms = step
    wanted, weights = recorded.numbers[mode], recorded.config["loss_weights"]
    flat = {key: float(value.detach()) for out in terms.values() for key, value in out.items()}
    total = sum(weights[name] * float(out[f"{name}_loss"].detach()) for name, out in terms.items())
    found = {
        "total": total,
        "sen_mlm": flat["sen_mlm_loss"],
        "mlm_ce": flat["mlm"],
        "sal": flat["sal"],
        "mim": flat["swin_unetr_mim_loss"],
        "local_itc": flat["local_itc_loss"],
        **{name: flat[name] for name in ("cml", "dcl", "ssm")},
    }
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def _recorded_tensors(net: MG3DNetwork, batch: dict, mode: str) -> dict[str, Tensor]:
    """Every recorded intermediate of the three objectives under its recorded name."""
    encoded = net.encode(batch)
    text, _ = net.fuse_report(encoded.masked_text, encoded.image)
    _, image = net.fuse_report(encoded.text, encoded.masked_image)
    recon = MaskedImage(net.options).reconstruct(net, encoded)
    local = LocalContrast(net.options).features(net, encoded)
    found = {
        "mlm.encoder_image_tokens": encoded.image_tokens,
        "mlm.uni_modal_image_feats": encoded.image,
        "mlm.multi_modal_text_feats": text,
        "mlm.full_text_embeddings": encoded.text_embeddings,
        "mlm.logits_first_sample": net.mlm_head(text, encoded.sentence_index)[0][0],
        "mim.mask_cells": batch["mim_mask"][0].to(torch.uint8),
        "mim.encoder_image_tokens": encoded.masked_image_tokens,
        "mim.multi_modal_image_feats": image,
        "mim.recon_slice": recon,
        f"itc.{mode}.uni_modal_cls_feats": local.uni_modal,
        f"itc.{mode}.multi_modal_cls_feats": local.multi_modal,
        f"itc.{mode}.multi_modal_image_cls_feats": local.fused_image,
        f"itc.{mode}.multi_modal_agg_image_cls_feats": local.aggregated_image,
        f"itc.{mode}.uni_modal_image_feats": encoded.contrast_image,
    }
    for row, count in enumerate(local.mask.sum(1).tolist()):
        found[f"itc.{mode}.agg_image_feats.{row}"] = local.visual_sentences[row : row + 1, :count]
        found[f"itc.sentence_text_embeddings.{row}"] = encoded.sentence_targets[row : row + 1, :count]
    return found


def test_recorded_intermediates(step, recorded):
    mode, net, _ = step
    other = MODES[1 - MODES.index(mode)]
    with torch.no_grad():
        found = _recorded_tensors(net, recorded.batch, mode)
    wanted = {key: value for key, value in recorded.tensors.items() if not key.startswith(f"itc.{other}.")}
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        got = found[name]
        if got.shape != want.shape:  # stored with a stride that the shapes tell
            strides = [full // part for full, part in zip(got.shape, want.shape, strict=True)]
            got = got[tuple(slice(None, None, stride) for stride in strides)]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_recorded_gradients(step, recorded):
    mode, net, _ = step
    wanted = recorded.numbers[f"{mode}_grad_l2"]
    largest = max(wanted.values())
    found = {name: float(p.grad.norm()) for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if want < 1e-6 * largest:
            assert found[name] <= 1e-5 * largest, name
        else:
            assert found[name] == pytest.approx(want, rel=2e-3), name


def test_names_without_gradient_and_parameter_groups(step, recorded):
    mode, net, _ = step
    complete = recorded.network(legacy_unused_modules=True)
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    silent = {name for name, p in complete.named_parameters() if p.requires_grad and name not in trained}
    assert silent == set(recorded.numbers[f"{mode}_no_gradient"])
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        name for name in recorded.state if name.startswith("language_encoder.")
    }
    groups = {name: parameter_group_index(name) for name, _ in complete.named_parameters()}
    assert groups == recorded.numbers["param_group_of"]


def test_recorded_adam_step(step, recorded):
    mode, trained, _ = step
    if mode != "projected":
        return  # recorded for this mode only
    net, wanted = recorded.loaded(mode), recorded.numbers["adam_step"]
    for mine, theirs in zip(net.parameters(), trained.parameters(), strict=True):
        mine.grad = theirs.grad
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = build_parameter_groups(
        net,
        learning_rate=wanted["lr_base"],
        weight_decay=wanted["group_weight_decay"][0],
        lr_multiplier_head=wanted["multiplier_head"],
        lr_multiplier_multi_modal=wanted["multiplier_multi_modal"],
    )
    assert [group["lr"] for group in groups] == pytest.approx(wanted["group_lrs"])
    assert [group["weight_decay"] for group in groups] == wanted["group_weight_decay"]
    build_optimizer(groups, "adam", wanted["lr_base"]).step()
    norms, compared = recorded.numbers["projected_grad_l2"], 0
    for name, parameter in net.named_parameters():
        delta = parameter.detach() - before[name]
        if name not in norms:
            assert not delta.any(), name
        elif norms[name] / parameter.numel() ** 0.5 >= 1e-6:
            # The step of an entry whose gradient is rounding noise (key biases) may be anything up to the rate.
            noise = parameter.grad.abs() < 1e-6
            rate = wanted["group_lrs"][parameter_group_index(name)]
            low = float(delta[~noise].norm())
            high = (low**2 + int(noise.sum()) * rate**2) ** 0.5
            assert low * 0.998 <= wanted["delta_l2"][name] <= high * 1.002, name
            compared += 1
    assert compared > 200


def test_full_size_names_and_shapes_are_the_published_ones(reference_dir):
    manifest = json.loads((reference_dir / "manifests" / "state_dict_manifest.json").read_text(encoding="utf-8"))
    wanted = manifest["common"] | manifest["vision_encoder"]["swin_b"]["keys"]
    vision = create_vision_encoder("swin_b")
    with torch.device("meta"):
        bert = bert_config(28996, 768, 12, num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512)
        net = MG3DNetwork(vision, BertTextEncoder(BertModel(bert)), NetworkOptions(legacy_unused_modules=True))
    found = {name: list(value.shape) for name, value in net.state_dict().items()}
    shapes = {name: entry["shape"] for name, entry in wanted.items() if entry["param"]}
    # The published head sizes the sums over image tokens for 384 of them, released files most likely for 48.
    sums = ("local_img_cross_multihead_attention.{}.fc1", "local_text_cross_multihead_attention.{}.fc2")
    resized = {f"{place.format(layer)}.weight" for place in sums for layer in range(2)}
    assert found == shapes | {name: [1, 48] for name in resized}


def test_each_view_is_encoded_once(monkeypatch):
    net, batch = tiny_network(), tiny_batch()
    calls: list[str] = []

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (calls.append(name), original(*args))[1])

    counted(net.vision_encoder, "tokens")
    counted(net.language_encoder, "contextualize")
    net(batch)
    assert (calls.count("tokens"), calls.count("contextualize")) == (2, 2)
    for name, wanted in (("sen_mlm", (1, 1)), ("swin_unetr_mim", (1, 1)), ("local_itc", (1, 1)), ("itc", (1, 1))):
        single = tiny_network(objectives=(name,))
        calls.clear()
        counted(single.vision_encoder, "tokens")
        counted(single.language_encoder, "contextualize")
        single(batch)
        assert (calls.count("tokens"), calls.count("contextualize")) == wanted, name


def test_image_only_never_reads_text():
    net, batch = tiny_network(objectives=("swin_unetr_mim",), image_only=True), tiny_batch()
    total_loss(net, {"image": batch["image"], "mim_mask": batch["mim_mask"]}).backward()
    assert net.multi_modal_vision_proj.weight.grad is not None
    with pytest.raises(ValueError, match="image_only"):
        NetworkOptions(image_only=True)


def test_published_initialisation():
    net = tiny_network()
    for module in (net.multi_modal_language_proj, net.mlm_head.decoder, net.itc_cross_head.vision_proj):
        assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(net.uni_modal_vision_pooler.dense.bias.detach().abs().sum()) == 0.0
    assert float(net.modality_type_embeddings.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    # Attentions keep the library default, uniform with this bound.
    query = net.local_text_cross_multihead_attention[0].query1.weight.detach()
    assert 0.9 * HIDDEN**-0.5 < float(query.abs().max()) <= HIDDEN**-0.5


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_text_encoder_takes_no_gradient(frozen):
    net = tiny_network(frozen=frozen, itc_detach_sentences=False)
    total_loss(net, tiny_batch()).backward()
    touched = any(p.grad is not None for p in net.language_encoder.parameters())
    assert touched is not frozen


def test_shared_space_vectors():
    net, batch = tiny_network(objectives=("itc",)).eval(), tiny_batch()
    with torch.no_grad():
        image = net.encode_image(batch["image"])
        report = net.encode_report(batch)
        prompt = net.encode_text(batch["sen_txt_ids"][:, 0], batch["sen_txt_masks"][:, 0])
        listed = net.encode_text(batch["sen_txt_ids"][:, :1], batch["sen_txt_masks"][:, :1])
    assert image.shape == report.shape == prompt.shape == (3, net.options.itc_embed_dim)
    for vectors in (image, report, prompt):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(prompt, listed)  # one sentence, given as a text or as a list of one sentence
    # A report of one sentence is a prompt: the second study has one.
    torch.testing.assert_close(report[1], prompt[1], rtol=1e-4, atol=1e-5)


def test_shared_space_reports_by_source():
    batch = tiny_batch()
    joined = tiny_network(objectives=("itc",)).eval()
    alone = tiny_network(objectives=("itc",), itc_text_source="sentence").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            alone.encode_report(batch), alone.encode_text(batch["sen_txt_ids"], batch["sen_txt_masks"])
        )
        torch.testing.assert_close(
            joined.encode_report(batch),
            joined.encode_text(batch["text_ids"], batch["text_masks"], batch["sentence_index"]),
        )
        assert float((joined.encode_report(batch)[0] - alone.encode_report(batch)[0]).abs().max()) > 1e-4


def test_shared_space_needs_its_objective():
    with pytest.raises(ValueError, match=r"loss_names\.itc"):
        tiny_network().encode_image(tiny_batch()["image"])


def test_an_empty_prompt_gives_a_zero_vector():
    net = tiny_network(objectives=("itc",)).eval()
    ids = torch.tensor([[2, 3, 0, 0], [2, 9, 3, 0]])
    with torch.no_grad():
        vectors = net.encode_text(ids, (ids > 0).long())
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([0.0, 1.0]))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image_feature_reuse"):
        tiny_network(embed_dim=12, image_feature_reuse="projected_reference")
    with pytest.raises(ValueError, match="max_text_len"):
        tiny_network(max_text_len=65)
    with pytest.raises(ValueError, match="fusion_variant"):
        tiny_network(fusion_variant="max")
    shallow = create_vision_encoder("swin_b", embed_dim=3, depths=(2, 2), num_heads=(1, 1), window_size=2)
    with pytest.raises(ValueError, match="stride"):
        MG3DNetwork(shallow, tiny_network().language_encoder, NetworkOptions(volume_size=VOLUME, hidden_size=HIDDEN))
