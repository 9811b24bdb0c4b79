"""The report generator: shapes, what is saved, cached decoding, losses (spec downstream 8.4-8.6 and 12.8)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mg3d.models.finetune.beam_search import SearchOptions
from mg3d.models.finetune.memory_generator import GeneratorOptions, MemoryGenerator
from mg3d.models.finetune.memory_layers import UnbiasedNorm
from mg3d.models.finetune.report_features import MultiScaleFeatures
from mg3d.models.finetune.report_losses import label_loss, ranking_loss, word_loss
from mg3d.models.vision_encoders import create_vision_encoder


def small(**changes: object) -> MemoryGenerator:
    torch.manual_seed(0)
    sizes = {"words": 40, "feature_width": 24, "width": 32, "hidden": 32, "longest": 30}
    return MemoryGenerator(GeneratorOptions(**{**sizes, **changes}))


def seen(batch: int = 3, width: int = 24) -> tuple[Tensor, Tensor]:
    feat = torch.randn(batch, 27, width, generator=torch.Generator().manual_seed(1))
    return feat, feat.mean(dim=1)


def report_ids() -> Tensor:
    return torch.tensor([[0, 5, 6, 7, 0, 0], [0, 8, 9, 10, 11, 0], [0, 12, 0, 0, 0, 0]])


def test_shapes() -> None:
    model = small().eval()
    feat, whole = seen()
    output = model(feat, whole, report_ids())
    assert output.logits.shape == (3, 5, 41)
    assert output.image_labels.shape == output.text_labels.shape == (3, 14)
    assert output.image.shape == output.text.shape == (3, 32)
    tokens = model.encoder_tokens(feat, output.image, model.initial_memory(3))
    assert tokens.shape == (3, 41, 24)
    assert model.encode(feat, whole).shape == (3, 41, 32)


@pytest.mark.parametrize(("width", "expected"), [(48, 1152), (96, 2304)])
def test_feature_widths_of_both_published_encoders(width: int, expected: int) -> None:
    torch.manual_seed(0)
    encoder = create_vision_encoder("swin_b" if width == 48 else "swin_l", depths=(1, 1, 1, 1))
    visual = MultiScaleFeatures(encoder).eval()
    with torch.no_grad():
        feat, whole = visual(visual.pooled(torch.rand(1, 1, 32, 32, 32)))
    assert feat.shape == (1, 27, expected)
    assert whole.shape == (1, expected)
    options = GeneratorOptions(words=5, feature_width=visual.width)
    assert MemoryGenerator(options).eval().encode(feat, whole).shape == (1, 41, 512)


@pytest.mark.parametrize("name", ["unet", "nnunet"])
def test_other_encoders_give_their_maps(name: str) -> None:
    sizes = {"unet": {"base_width": 4}, "nnunet": {"features_per_stage": [4, 8, 8, 8, 8, 8]}}
    encoder = create_vision_encoder(name, **sizes[name])
    visual = MultiScaleFeatures(encoder).eval()
    with torch.no_grad():
        assert visual.pooled(torch.rand(1, 1, 64, 64, 64)).shape == (1, 27, sum(encoder.stage_channels))


def test_the_published_norm_leaves_nothing_in_the_global_feature() -> None:
    encoder = create_vision_encoder("swin_b", embed_dim=12)
    pooled = torch.rand(2, 27, 288)
    published = MultiScaleFeatures(encoder, "positions_reference")(pooled)[1]
    ours = MultiScaleFeatures(encoder)(pooled)[1]
    assert published.abs().max() < 1e-4
    assert (ours[0] - ours[1]).abs().max() > 0.05
    with pytest.raises(ValueError, match="norm must be"):
        MultiScaleFeatures(encoder, "batch")


def test_statistics_of_the_training_volumes_are_taken_away() -> None:
    visual = MultiScaleFeatures(create_vision_encoder("swin_b", embed_dim=12))
    pooled = torch.rand(5, 27, 288) * 3 + 7
    visual.fit(pooled)
    centred = (pooled - visual.mean) / visual.deviation
    assert centred.mean(dim=0).abs().max() < 1e-4
    assert (centred.std(dim=0, correction=0) - 1).abs().max() < 1e-3
    assert {"mean", "deviation"} <= visual.state_dict().keys()


def test_memory_and_mask_are_saved_and_used() -> None:
    model = small()
    state = model.state_dict()
    assert state["memory"].shape == (60, 32)
    assert torch.equal(state["memory"], torch.eye(60, 32))
    assert state["memory_mask"].shape == (1, 1, 1, 60)
    model.eval()
    before = model.encode(*seen())
    model.memory_mask[..., :30] = False
    assert not torch.allclose(before, model.encode(*seen()))


def test_the_layer_norm_divides_by_the_unbiased_deviation() -> None:
    norm, x = UnbiasedNorm(4), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    expected = (x - 3.0) / (torch.tensor(14 / 3).sqrt() + 1e-6)
    assert torch.allclose(norm(x), expected)


def test_a_word_never_sees_the_words_behind_it() -> None:
    model = small().eval()
    ids, changed = report_ids(), report_ids()
    changed[:, 3] = 20
    one, other = model(*seen(), ids).logits, model(*seen(), changed).logits
    assert torch.allclose(one[:, :3], other[:, :3], atol=1e-6)
    assert not torch.allclose(one[:, 3], other[:, 3])


def test_padding_changes_nothing() -> None:
    model = small().eval()
    ids = report_ids()[:, :5]
    longer = torch.nn.functional.pad(ids, (0, 9))
    one, other = model(*seen(), ids), model(*seen(), longer)
    assert torch.allclose(one.logits, other.logits[:, :4], atol=1e-6)
    assert torch.allclose(one.text, other.text, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_memory_sees_the_report_only_in_training(share: float) -> None:
    model = small(dropout=0.0, text_memory=share)
    ids, changed = report_ids(), report_ids()
    changed[:, 4] = 33  # behind the positions that are compared
    for training in (False, True):
        model.train(training)
        alike = torch.allclose(model(*seen(), ids).logits[:, :3], model(*seen(), changed).logits[:, :3], atol=1e-6)
        assert alike != (training and share == 1.0)


def test_blanked_patches_leave_the_priors_and_never_touch_the_test() -> None:
    model = small(dropout=0.0, text_memory=0.0, patch_dropout=1.0, places=27)
    (feat, whole), (other, _) = seen(), seen()
    other = other + torch.randn(3, 27, 24, generator=torch.Generator().manual_seed(5))
    model.image_vector = lambda *_: torch.ones(3, 32)  # type: ignore[method-assign]
    for training in (True, False):
        model.train(training)
        one, two = model(feat, whole, report_ids()).logits, model(other, whole, report_ids()).logits
        assert torch.allclose(one, two, atol=1e-6) == training


def test_only_the_places_start_larger_and_only_when_asked() -> None:
    default, larger = (small(places=27, place_scale=scale).state_dict() for scale in (0.0, 2.0))
    assert [name for name, tensor in default.items() if not torch.equal(tensor, larger[name])] == ["token_places"]
    assert default["token_places"].std() < 0.5
    assert larger["token_places"].std() == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_cache_changes_no_report(blocked: bool, layers: int) -> None:
    model = small(layers=layers, places=27).eval()
    torch.nn.init.normal_(model.scores.weight, std=0.5)
    options = SearchOptions(beams=3, max_words=20, min_words=4, block_trigrams=blocked)
    cached, prefix = (model.generate(*seen(5), options, cached=flag) for flag in (True, False))
    assert torch.equal(cached.ids, prefix.ids)
    assert torch.allclose(cached.scores, prefix.scores, atol=1e-4)


def test_beams_never_score_below_greedy_and_every_score_is_that_of_its_words() -> None:
    model = small().eval()
    torch.nn.init.normal_(model.scores.weight, std=0.5)
    feat, whole = seen(16)
    greedy = model.generate(feat, whole, SearchOptions(beams=1, max_words=12))
    beam = model.generate(feat, whole, SearchOptions(beams=3, max_words=12))
    assert (beam.scores >= greedy.scores - 1e-5).all()
    assert (beam.scores > greedy.scores + 1e-3).any()
    full = torch.nn.functional.pad(beam.ids, (1, 13 - beam.ids.shape[1]))
    logp = model(feat, whole, full).logits.log_softmax(dim=-1).gather(2, full[:, 1:, None])[..., 0]
    lengths = (beam.ids != 0).sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        told = logp[row, : length + (length < 12)].sum()
        assert beam.scores[row].item() == pytest.approx(told.item(), abs=1e-3)


def test_too_long_reports_are_refused() -> None:
    with pytest.raises(ValueError, match="positions for 30"):
        small()(*seen(1), torch.ones(1, 40, dtype=torch.long))


def test_word_loss_counts_the_end_but_no_padding() -> None:
    ids = report_ids()
    logits = torch.randn(3, 5, 41, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    logp = logits.log_softmax(dim=-1)
    wanted = [-logp[b, t, ids[b, t + 1]] for b in range(3) for t in range(int(counts[b].sum()))]
    assert word_loss(logits, ids[:, 1:], counts).item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-5)
    assert word_loss(logits, ids[:, 1:], torch.zeros(3, 5)).item() == 0.0


def test_label_loss_is_binary_cross_entropy() -> None:
    logits, labels = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = -(torch.tensor(0.5).log() + (1 - torch.tensor(2.0).sigmoid()).log()) / 2
    assert label_loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-6)


def test_ranking_loss_by_hand() -> None:
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    alike = torch.ones(2, 3)
    assert ranking_loss(image, text, alike).item() == 0.0  # equal labels, impostors score lower
    swapped = ranking_loss(image.flip(0), text, alike)
    # scores: pairs 0 and 0; image impostors 2 and 3, text impostors 3 and 2; no margin
    assert swapped.item() == pytest.approx((2 + 3) / 2 + (3 + 2) / 2)
    # 3 of 4 labels differ: margin 0.75; 1 of 4 differs: 0.5
    far, near = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    zero = torch.zeros(2, 2)
    assert ranking_loss(zero, zero, far).item() == pytest.approx(2 * 0.75)
    assert ranking_loss(zero, zero, near).item() == pytest.approx(2 * 0.5)
