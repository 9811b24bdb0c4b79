from __future__ import annotations

import math

import pytest
import torch
from golden_support import check_gradients, check_outputs, load_entry, under
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from mg3d.models.heads import ITCHead, ITCHeadSingle
from mg3d.models.losses import (
    contrastive_loss,
    mim_loss,
    mlm_loss,
    sentence_alignment_loss,
    sentence_similarity_loss,
)


def padded(tensors: dict[str, Tensor], prefix: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Leaves of one list of ``[1, S_b, F]`` tensors, padded ``[B, S, F]``, and the mask."""
    rows = under(tensors, prefix)
    leaves = [rows[str(b)].requires_grad_() for b in range(len(rows))]
    mask = pad_sequence([torch.ones(leaf.shape[1]).bool() for leaf in leaves], batch_first=True)
    return leaves, pad_sequence([leaf[0] for leaf in leaves], batch_first=True), mask


def gradients(prefix: str, leaves: list[Tensor]) -> dict[str, Tensor | None]:
    return {f"{prefix}.{b}": leaf.grad for b, leaf in enumerate(leaves)}


def test_golden_sentence_mlm(golden_dir):
    tensors, record = load_entry(golden_dir, "loss_sen_mlm")
    logits = tensors["in.logits"].requires_grad_()
    recon, recon_BSF, mask = padded(tensors, "in.recon")
    target, target_BSF, _ = padded(tensors, "in.target")
    mlm = mlm_loss(logits, tensors["in.labels"])
    sal = sentence_alignment_loss(recon_BSF, target_BSF, mask, weight=record["config"]["weight"])
    (mlm + sal).backward()
    check_outputs({"total": mlm + sal, "mlm_ce": mlm, "sal": sal}, under(tensors, "loss"), record)
    got = {"in.logits": logits.grad} | gradients("in.recon", recon) | gradients("in.target", target)
    check_gradients(got, under(tensors, "grad"), record)


def test_golden_masked_image(golden_dir):
    tensors, record = load_entry(golden_dir, "loss_mim")
    recon, target = tensors["in.recon"].requires_grad_(), tensors["in.target_bdchw"].transpose(1, 2)
    loss = mim_loss(recon, target, tensors["in.mask"], record["config"]["ratio"])
    loss.backward()
    check_outputs({"mim": loss}, under(tensors, "loss"), record)
    check_gradients({"in.recon": recon.grad}, under(tensors, "grad"), record)
    torch.testing.assert_close(mim_loss(recon, target, tensors["in.mask"]), loss)


def test_golden_sentence_similarity(golden_dir):
    tensors, record = load_entry(golden_dir, "loss_ssm")
    visual, visual_BSF, mask = padded(tensors, "in.sen_image")
    _, text_BSC, _ = padded(tensors, "in.sen_text")
    loss = sentence_similarity_loss(visual_BSF, text_BSC, mask)
    loss.backward()
    check_outputs({"ssm": loss}, under(tensors, "loss"), record)
    check_gradients(gradients("in.sen_image", visual), under(tensors, "grad"), record)


@pytest.mark.parametrize("batch", ["B3", "B1"])
def test_golden_local_contrast(golden_dir, batch):
    tensors, record = load_entry(golden_dir, f"loss_local_itc_{batch}")
    width, temperature = record["config"]["D"], record["config"]["temp"]
    heads = {
        "itc_cross_head": ITCHead(2 * width, width, temperature),
        "itc_agg_head": ITCHeadSingle(width, temperature),
    }
    for name, head in heads.items():
        head.load_state_dict(under(tensors, f"state.{name}"))
    names = ("multi_modal_cls", "uni_modal_cls", "multi_modal_image_cls", "agg_image_cls")
    vectors = [tensors[f"in.{name}"].requires_grad_() for name in names]
    visual, visual_BSF, mask = padded(tensors, "in.sen_image")
    _, text_BSC, _ = padded(tensors, "in.sen_text")
    cross = heads["itc_cross_head"](*vectors[:2])
    aggregated = heads["itc_agg_head"](*vectors[2:])
    cml, dcl = contrastive_loss(*cross), contrastive_loss(*aggregated)
    ssm = sentence_similarity_loss(visual_BSF, text_BSC, mask, *record["config"]["thresholds"])
    total = cml + dcl + ssm
    total.backward()
    check_outputs({"total": total, "cml": cml, "dcl": dcl, "ssm": ssm}, under(tensors, "loss"), record)
    torch.testing.assert_close(cross[0], tensors["itc_logits_cross_image"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aggregated[1], tensors["agg_itc_logits_gl_image_agg"], rtol=1e-4, atol=1e-5)
    got = {f"in.{name}": v.grad for name, v in zip(names, vectors, strict=True)} | gradients("in.sen_image", visual)
    got |= {f"param.{n}.{k}": p.grad for n, head in heads.items() for k, p in head.named_parameters()}
    check_gradients(got, under(tensors, "grad"), record)


def test_mlm_without_labels_is_zero_with_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = mlm_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


def test_mlm_is_the_mean_over_labelled_positions():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, -100], [0, 4, -100]])
    want = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(mlm_loss(logits, labels), want)


def test_alignment_leaves_out_empty_reports_and_stops_the_target():
    torch.manual_seed(0)
    recon, target = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    has_text = torch.tensor([True, True, False])
    loss = sentence_alignment_loss(recon, target, mask, has_text, detach_target=True)
    loss.backward()
    distance = 1 - cosine_similarity(recon, target, dim=-1)
    torch.testing.assert_close(loss, 0.1 * (distance[0].sum() + distance[1, :2].sum()) / 2)
    assert target.grad is None and recon.grad is not None and not recon.grad[2].any()


def test_alignment_of_zero_padding_has_finite_gradients():
    recon = torch.zeros(1, 2, 8, requires_grad=True)
    sentence_alignment_loss(recon, torch.zeros(1, 2, 8), torch.ones(1, 2).bool()).backward()
    assert recon.grad is not None and recon.grad.isfinite().all()


def test_mim_divides_by_masked_count_or_ratio():
    recon, target = torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    mask = torch.zeros(2, 1, 2, 2, 2).bool()
    mask[:, :, 0, 0, 0] = True
    assert mim_loss(recon, target, mask).item() == pytest.approx(1.0)
    assert mim_loss(recon, target, mask, ratio=0.5).item() == pytest.approx(0.25)
    assert mim_loss(recon, target, torch.zeros_like(mask)).item() == 0.0
    with pytest.raises(ValueError, match="differ in shape"):
        mim_loss(recon, target[:1], mask)


def test_contrastive_valid_mask_equals_leaving_the_sample_out():
    torch.manual_seed(1)
    logits = torch.randn(4, 4, requires_grad=True)
    valid = torch.tensor([True, False, True, True])
    kept = logits[valid][:, valid]
    torch.testing.assert_close(contrastive_loss(logits, logits.t(), valid), contrastive_loss(kept, kept.t()))
    contrastive_loss(logits, logits.t(), torch.zeros(4).bool()).backward()
    assert logits.grad is not None and not logits.grad.any()


def test_contrastive_accepts_extra_negatives():
    torch.manual_seed(2)
    logits, extra = torch.randn(3, 3), torch.randn(3, 5)
    wide, labels = torch.cat([logits, extra], dim=1), torch.arange(3)
    want = 0.5 * (cross_entropy(wide, labels) + cross_entropy(logits.t(), labels))
    torch.testing.assert_close(contrastive_loss(wide, logits.t()), want)
    torch.testing.assert_close(contrastive_loss(wide, logits.t(), torch.ones(3).bool()), want)
    assert contrastive_loss(wide, wide, torch.tensor([True, False, True])).isfinite()


def test_contrastive_same_pairs_are_no_negatives_of_each_other():
    torch.manual_seed(5)
    logits, extra = torch.randn(4, 4, requires_grad=True), torch.randn(4, 2)
    wide, valid = torch.cat([logits, extra], dim=1), torch.tensor([True, True, True, False])
    same = torch.eye(4).bool()
    torch.testing.assert_close(
        contrastive_loss(wide, logits.t(), valid, same), contrastive_loss(wide, logits.t(), valid)
    )
    same[0, 2] = same[2, 0] = True
    for chosen in (None, valid):
        loss = contrastive_loss(wide, logits.t(), chosen, same)
        rows = range(4 if chosen is None else 3)
        wanted = []
        for square, more in ((logits, extra), (logits.t(), extra[:, :0])):
            for row in rows:
                kept = [square[row, column] for column in rows if not (column != row and same[row, column])]
                each = torch.stack([*kept, *more[row]])
                wanted.append(each.logsumexp(0) - square[row, row])
        torch.testing.assert_close(loss, torch.stack(wanted).mean())
    loss.backward()
    assert logits.grad is not None and logits.grad[0, 2] == logits.grad[2, 0] == 0 and logits.grad[0, 1] != 0


def test_one_valid_sample_counts_once():
    logits, extra = torch.zeros(2, 2), torch.zeros(2, 3)
    valid = torch.tensor([True, False])
    loss = contrastive_loss(torch.cat([logits, extra], dim=1), logits, valid)
    assert loss.item() == pytest.approx(0.5 * math.log(4))


def test_cosines_do_not_depend_on_the_length_of_small_vectors():
    torch.manual_seed(6)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    mask = torch.ones(2, 3).bool()
    for loss in (sentence_alignment_loss, sentence_similarity_loss):
        torch.testing.assert_close(loss(0.01 * x, 0.01 * y, mask), loss(x, y, mask), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("text", "wanted"), [([1.0, 0.0], 0.4), ([0.0, 1.0], 0.6)])
def test_a_cosine_on_the_threshold_counts(text, wanted):
    """Text cosines 1 (equal) and 0 (different), visual cosine 0.6: |0.6 - 1| as the same, |0.6| as another finding."""
    visual = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]])
    texts = torch.tensor([[[1.0, 0.0]], [text]])
    loss = sentence_similarity_loss(visual, texts, torch.ones(2, 1).bool(), 1.0, 0.0)
    assert loss.item() == pytest.approx(wanted, abs=1e-5)


def similarity_by_loops(visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    total, pairs = torch.zeros(()), 0
    rows = [b for b in range(len(mask)) if mask[b].any()]
    for n, i in enumerate(rows):
        for j in rows[n + 1 :]:
            g = cosine_similarity(text[i][mask[i]].unsqueeze(1), text[j][mask[j]].unsqueeze(0), dim=-1)
            w = cosine_similarity(visual[i][mask[i]].unsqueeze(1), visual[j][mask[j]].unsqueeze(0), dim=-1)
            positive, negative = (g >= 0.9).float(), (g <= 0.6).float()
            total, pairs = total + (w * (positive + negative) - g * positive).abs().mean(), pairs + 1
    return total / (pairs + 1e-6)


@pytest.mark.parametrize("counts", [[5, 1, 3, 2], [5, 0, 3, 0], [0, 2, 0, 0]])
def test_similarity_equals_loops_over_pairs(counts):
    torch.manual_seed(3)
    base = torch.randn(4, 1, 12)
    text = base[:1] + torch.randn(4, 5, 12) * torch.rand(4, 5, 1)
    visual = torch.randn(4, 5, 6, requires_grad=True)
    mask = torch.arange(5) < torch.tensor(counts).unsqueeze(1)
    loss = sentence_similarity_loss(visual, text, mask)
    torch.testing.assert_close(loss, similarity_by_loops(visual, text, mask))
    loss.backward()
    assert visual.grad is not None and visual.grad.isfinite().all() and not visual.grad[~mask].any()


def test_similarity_ignores_order_padding_and_autocast():
    torch.manual_seed(4)
    text, visual = torch.randn(3, 1, 12) + 0.6 * torch.randn(3, 4, 12), torch.randn(3, 4, 6)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    loss = sentence_similarity_loss(visual, text, mask)
    order, batch = torch.randperm(4), torch.tensor([2, 0, 1])
    shuffled = (x[batch][:, order] for x in (visual, text, mask))
    torch.testing.assert_close(sentence_similarity_loss(*shuffled), loss)
    dirty = visual + 50 * ~mask.unsqueeze(-1)
    torch.testing.assert_close(sentence_similarity_loss(dirty, text, mask), loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sentence_similarity_loss(visual, text, mask), loss)
