from __future__ import annotations

import math

import pytest
import torch
from tiny_network import enlarge, take, tiny_batch, tiny_network, total_loss
from torch import Tensor

from mg3d.errors import ConfigError
from mg3d.models.memory_queues import CrossBatchMemory
from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives import OBJECTIVES, create_objective
from mg3d.models.objectives.image_text_contrast import inner_tokens
from mg3d.models.options import NetworkOptions

EVERY = tuple(OBJECTIVES)
DRAWS = {"itm": 2}


def losses(net: MG3DNetwork, batch: dict) -> dict[str, Tensor]:
    return {f"{name}.{key}": value.detach() for name, terms in net(batch).items() for key, value in terms.items()}


def gradients(net: MG3DNetwork, batch: dict) -> dict[str, Tensor]:
    net.zero_grad()
    total_loss(net, batch).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def everything(**options) -> MG3DNetwork:
    return enlarge(tiny_network(objectives=EVERY, **options)).eval()


def test_an_unknown_objective_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match="swin_unter_mim") as caught:
        create_objective("swin_unter_mim", NetworkOptions())
    assert "did you mean 'swin_unetr_mim'" in str(caught.value)
    assert "local_itc" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "steps", "rate"),
    [("sen_mlm", 6, 3e-3), ("swin_unetr_mim", 6, 3e-3), ("local_itc", 30, 1e-3), ("itc", 20, 1e-3), ("itm", 24, 3e-3)],
)
def test_each_objective_learns(name, steps, rate):
    net = tiny_network(objectives=(name,)).train()
    batch = tiny_batch((3, 1, 5, 2), false_images=DRAWS.get(name, 0))
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = total_loss(net, batch)
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(seen)))
    assert seen[-1] < 0.9 * seen[0], seen


def test_terms_add_up():
    found = losses(everything(), tiny_batch(false_images=2))
    torch.testing.assert_close(found["sen_mlm.sen_mlm_loss"], found["sen_mlm.mlm"] + found["sen_mlm.sal"])
    local = found["local_itc.cml"] + found["local_itc.dcl"] + found["local_itc.ssm"]
    torch.testing.assert_close(found["local_itc.local_itc_loss"], local)
    assert all(0.0 <= float(value) <= 1.0 for key, value in found.items() if key.endswith(".accuracy"))


def test_the_order_of_the_studies_does_not_matter():
    net, batch = everything(), tiny_batch((3, 1, 5, 0), false_images=1)
    mixed = take(batch, [2, 0, 3, 1])
    torch.testing.assert_close(losses(net, mixed), losses(net, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sen_mlm", "local_itc", "itc", "itm"])
def test_an_empty_report_takes_no_part_in_text_terms(name):
    """Loss and gradient with an empty report equal those of the batch without that study."""
    net = tiny_network(objectives=(name,), memory_queue="none").eval().double()
    batch = tiny_batch((3, 0, 5), false_images=DRAWS.get(name, 0))
    # double precision: the normalisations of a random network amplify rounding, which differs between batch sizes
    batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    kept = take(batch, [0, 2])
    torch.testing.assert_close(losses(net, batch), losses(net, kept), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(net, batch), gradients(net, kept), rtol=1e-3, atol=1e-6)


def test_an_empty_report_still_teaches_reconstruction():
    batch = tiny_batch((3, 0))
    for fusion in ("mlm_cross", "mim_cross"):
        net = tiny_network(objectives=("swin_unetr_mim",), mim_fusion=fusion).eval()
        before = losses(net, batch)["swin_unetr_mim.swin_unetr_mim_loss"]
        batch["image"][1] += 1.0
        after = losses(net, batch)["swin_unetr_mim.swin_unetr_mim_loss"]
        assert torch.isfinite(after)
        assert abs(float(after - before)) > 1e-3


@pytest.mark.parametrize("counts", [(0, 0), (0,), (1,), (4,)])
def test_small_and_empty_batches_are_finite(counts):
    net, batch = everything(), tiny_batch(counts, false_images=1)
    found, grads = losses(net, batch), gradients(net, batch)
    assert all(torch.isfinite(value).all() for value in (*found.values(), *grads.values()))
    if not any(counts):
        text_terms = ("sen_mlm.sen_mlm_loss", "local_itc.local_itc_loss", "itc.itc_loss", "itm.itm_loss")
        assert all(float(found[key]) == 0.0 for key in text_terms)
    if len(counts) == 1:
        assert float(found["local_itc.ssm"]) == 0.0


def test_empty_reports_may_omit_the_flag():
    net, batch = everything(), tiny_batch((3, 0, 5), false_images=1)
    with_flag = losses(net, batch)
    del batch["has_text"]
    torch.testing.assert_close(losses(net, batch), with_flag)


def test_stand_alone_sentences_must_match_the_index():
    batch = tiny_batch((3, 2))
    for key in ("sen_txt_ids", "sen_txt_masks"):
        batch[key] = batch[key][:, :2]
    with pytest.raises(ValueError, match="sen_txt_ids has 2 sentence slots"):
        tiny_network(objectives=("local_itc",))(batch)


def test_matching_needs_negative_volumes():
    with pytest.raises(ValueError, match="draw_false_image"):
        tiny_network(objectives=("itm",))(tiny_batch())


# Each switch of the specification changes the terms it should, and no other.
SWITCHES = [
    ({"sal_weight": 0.5}, {"sen_mlm.sen_mlm_loss", "sen_mlm.sal"}),
    ({"mim_fusion": "mim_cross"}, {"swin_unetr_mim.swin_unetr_mim_loss"}),
    (
        {"image_feature_reuse": "projected_reference"},
        {f"local_itc.{key}" for key in ("local_itc_loss", "cml", "dcl", "ssm")} | {"itm.itm_loss"},
    ),
    ({"ssm_positive_threshold": 0.99, "ssm_negative_threshold": 0.0}, {"local_itc.local_itc_loss", "local_itc.ssm"}),
    ({"cl_temp": 0.5}, {"local_itc.local_itc_loss", "local_itc.cml", "local_itc.dcl", "itc.itc_loss"}),
    ({"itc_text_source": "sentence"}, {"itc.itc_loss"}),
    ({"fusion_variant": "ctrate"}, None),
    ({"sal_detach_target": True}, set()),
    ({"itc_detach_sentences": False}, set()),
    ({"contrastive_gather": "local"}, set()),
    ({"same_report_pairs": "mask"}, set()),  # the reports of this batch all differ
    ({"legacy_unused_modules": True}, set()),
]


@pytest.mark.parametrize(("switch", "changed"), SWITCHES, ids=[str(switch)[:40] for switch, _ in SWITCHES])
def test_a_switch_changes_what_it_should(switch, changed):
    batch, plain, other = tiny_batch(false_images=1), everything(), everything(**switch)
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert bool(missing) is ("legacy_unused_modules" in switch)
    before, after = losses(plain, batch), losses(other, batch)
    moved = {key for key in before if not torch.allclose(before[key], after[key], rtol=1e-6, atol=1e-7)}
    moved = {key for key in moved if not key.endswith("accuracy")}
    if changed is None:  # another fusion reaches everything that fuses
        assert {"sen_mlm.mlm", "swin_unetr_mim.swin_unetr_mim_loss", "local_itc.cml", "itm.itm_loss"} <= moved
        assert "itc.itc_loss" not in moved
    else:
        assert moved == changed


def test_sentences_of_the_local_contrast_are_detached_on_request():
    batch = tiny_batch()
    touched = {}
    for detach in (True, False):
        net = tiny_network(objectives=("local_itc",), itc_detach_sentences=detach)
        touched[detach] = "multi_modal_language_proj.weight" in gradients(net, batch)
    assert touched == {True: False, False: True}


def test_the_alignment_target_is_detached_on_request():
    batch = tiny_batch()
    for detach in (True, False):
        net = tiny_network(objectives=("sen_mlm",), sal_detach_target=detach)
        assert any(name.startswith("uni_emd_sen") for name in gradients(net, batch)) is not detach


@pytest.mark.parametrize("kind", ["moco", "xbm"])
def test_memory_adds_negatives_in_training_only(kind):
    batch = tiny_batch((3, 0, 5))
    plain = tiny_network(objectives=("local_itc", "itc"))
    net = tiny_network(objectives=("local_itc", "itc"), memory_queue=kind, memory_queue_size=4)
    net.load_state_dict(plain.state_dict(), strict=False)
    names = {name for name, _ in net.named_buffers() if "xbm" in name}
    assert {"cml_loss_cls_xbm.queue_1", "dcl_loss_cls_xbm.queue_2", "itc_loss_xbm.queue_1"} <= names
    net.eval()
    stored = {name: value.clone() for name, value in net.named_buffers()}
    losses(net, batch)
    torch.testing.assert_close(dict(net.named_buffers()), stored)
    net.train()
    for _ in range(3):  # two reports a step into four places: the last step meets a full memory
        found = losses(net, batch)
    for key in ("local_itc.cml", "local_itc.dcl", "itc.itc_loss"):
        assert float(found[key]) > float(losses(plain, batch)[key]) + 0.1, key
    assert float(found["local_itc.ssm"]) == pytest.approx(float(losses(plain, batch)["local_itc.ssm"]), rel=1e-5)
    assert torch.isfinite(total_loss(net, tiny_batch((2, 2, 1, 1, 3, 1)))), "a batch larger than the memory"


def test_memory_keeps_only_reports_with_text():
    net = tiny_network(objectives=("local_itc",), memory_queue="xbm", memory_queue_size=8).train()
    net(tiny_batch((3, 0, 5, 0)))
    queue = net.get_submodule("cml_loss_cls_xbm")
    assert isinstance(queue, CrossBatchMemory)
    assert queue.get()[0].shape == (2, 2 * net.options.hidden_size)
    net(tiny_batch((0, 0)))
    assert len(queue.get()[0]) == 2


def test_inner_tokens_leaves_the_special_tokens_out():
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    wanted = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(inner_tokens(mask), wanted)


# Batches at the edge: what they give, beside being finite.
QUEUES = ("none", "moco", "xbm")


def identical(batch: dict, *prefixes: str) -> dict:
    """The batch with some tensors of every study replaced by those of the first."""
    return {
        key: value[:1].expand_as(value).clone() if torch.is_tensor(value) and key.startswith(prefixes) else value
        for key, value in batch.items()
    }


TEXT_KEYS = ("text_", "sentence_", "sen_txt", "has_text", "report_key")
IMAGE_KEYS = ("image", "false_image", "mim_mask")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", QUEUES)
@pytest.mark.parametrize(
    ("counts", "prefixes"),
    [((4,), ()), ((3, 1), ()), ((3, 3, 3), TEXT_KEYS), ((3, 1, 5), IMAGE_KEYS), ((3, 3, 3), TEXT_KEYS + IMAGE_KEYS)],
    ids=["one study", "a short last batch", "identical texts", "identical images", "identical studies"],
)
def test_batches_at_the_edge_are_finite_through_every_objective(counts, prefixes, kind, training):
    net = everything(memory_queue=kind, memory_queue_size=4).train(training)
    batch = identical(tiny_batch(counts, false_images=1), *prefixes)
    for _ in range(3):  # the memory is empty, part full, full
        found, grads = losses(net, batch), gradients(net, batch)
        assert {f"{name}.{name}_loss" for name in EVERY} <= found.keys()
        assert all(torch.isfinite(value).all() for value in (*found.values(), *grads.values()))
        assert torch.isfinite(torch.stack([value.detach().float().abs().max() for value in net.buffers()])).all()


@pytest.mark.parametrize("training", [True, False])
def test_one_study_has_nothing_to_be_told_from(training):
    found = losses(everything().train(training), tiny_batch((4,), false_images=1))
    assert [float(found[key]) for key in ("itc.itc_loss", "local_itc.cml", "local_itc.dcl", "local_itc.ssm")] == [
        0.0
    ] * 4


@pytest.mark.parametrize("training", [True, False])
def test_identical_studies_give_the_log_of_their_number(training):
    """No study can be told from another: each contrastive term is log B; as one report, masked, it is 0."""
    studies = 3
    batch = identical(tiny_batch((3,) * studies, false_images=1), *TEXT_KEYS, *IMAGE_KEYS)
    found = losses(everything().train(training), batch)
    for key in ("itc.itc_loss", "local_itc.cml", "local_itc.dcl"):
        assert float(found[key]) == pytest.approx(math.log(studies), abs=1e-4), key
    masked = losses(everything(same_report_pairs="mask").train(training), batch)
    for key in ("itc.itc_loss", "local_itc.cml", "local_itc.dcl"):
        assert float(masked[key]) == pytest.approx(0.0, abs=1e-6), key


@pytest.mark.parametrize("training", [True, False])
def test_identical_texts_or_images_cannot_beat_chance_in_the_shared_space(training):
    """Where one side is the same for all studies, InfoNCE is at least log B."""
    for prefixes in (TEXT_KEYS, IMAGE_KEYS):
        batch = identical(tiny_batch((3, 3, 3), false_images=1), *prefixes)
        loss = float(losses(everything().train(training), batch)["itc.itc_loss"])
        assert loss >= math.log(3) - 1e-4


def test_studies_with_the_same_report_are_masked_and_counted_on_request():
    """Two reconstructions of one scan share a report; empty reports are none, whatever their key."""
    batch = tiny_batch((3, 3, 5, 0, 0), false_images=1)
    batch["report_key"] = torch.tensor([7, 7, 8, 9, 9])
    kept, masked = losses(everything(), batch), losses(everything(same_report_pairs="mask"), batch)
    assert float(masked["itc.same_report_pairs"]) == float(masked["local_itc.same_report_pairs"]) == 1.0
    assert not any(key.endswith("same_report_pairs") for key in kept)
    for key in ("itc.itc_loss", "local_itc.cml", "local_itc.dcl"):
        assert float(masked[key]) < float(kept[key]), key
    others = [key for key in kept if key.split(".")[0] in ("sen_mlm", "swin_unetr_mim", "itm")] + ["local_itc.ssm"]
    assert all(torch.equal(masked[key], kept[key]) for key in others)


# Accumulation: k batches of b against one batch of k b, as Lightning averages the k losses.
def accumulated(net: MG3DNetwork, batch: dict, size: int) -> dict[str, Tensor]:
    parts = [losses(net, take(batch, list(range(at, at + size)))) for at in range(0, len(batch["image"]), size)]
    return {key: torch.stack([part[key].float() for part in parts]).mean() for key in parts[0]}


def test_accumulation_equals_the_large_batch_where_no_study_is_compared_with_another():
    """Equal numbers of sentences and masked words in every part: a mean of means is the mean."""
    net, batch = everything(), tiny_batch((2, 2, 2, 2), false_images=1)
    chosen = torch.zeros_like(batch["text_ids"], dtype=torch.bool)
    chosen[:, [2, 6]] = True
    batch["text_labels_mlm"] = batch["text_ids"].masked_fill(~chosen, -100)
    batch["text_ids_mlm"] = batch["text_ids"].masked_fill(chosen, 4)
    whole, parts = losses(net, batch), accumulated(net, batch, 2)
    for key in ("sen_mlm.mlm", "sen_mlm.sal", "swin_unetr_mim.swin_unetr_mim_loss", "itm.itm_loss"):
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-5, atol=1e-5, msg=key)


def test_accumulation_leaves_contrastive_terms_their_small_batch_of_negatives():
    """The documented difference: of k b identical studies the large batch costs log(k b), each part log(b)."""
    batch = identical(tiny_batch((2, 2, 2, 2), false_images=1), *TEXT_KEYS, *IMAGE_KEYS)
    whole, parts = losses(everything(), batch), accumulated(everything(), batch, 2)
    for key in ("itc.itc_loss", "local_itc.cml", "local_itc.dcl"):
        assert float(whole[key] - parts[key]) == pytest.approx(math.log(2), abs=1e-4), key
