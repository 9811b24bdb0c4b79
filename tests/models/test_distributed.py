"""Two local processes against one: the gathers, the shared counts and the recorded two-rank gradients."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_support import check_gradients, load_entry, under
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mg3d.models.distributed import gather_features, gather_sentences, global_mean, rank, world_size
from mg3d.models.heads import ITCHead
from mg3d.models.losses import contrastive_loss, mim_loss, mlm_loss, sentence_alignment_loss, sentence_similarity_loss
from mg3d.models.memory_queues import MoCoQueue, MoCoSentenceQueue

WORLD, BATCH, WIDTH, SENTENCES = 2, 3, 12, 5
COUNTS = [2, 5, 1, 3, 0, 2]
"""Sentences per report: the longest report of the two ranks differs, one report is empty."""


class Tower(nn.Module):
    """Stands for the network: all losses on features of shared parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.vocabulary = nn.Linear(WIDTH, 7)
        self.head = ITCHead(WIDTH, 8)

    def forward(self, batch: dict[str, Tensor], gather: str) -> Tensor:
        x = torch.tanh(self.body(batch["x"]))
        tokens = torch.tanh(self.body(batch["sentences"]))
        longest = int(batch["mask"].sum(1).max())
        mask, sentences = batch["mask"][:, :longest], tokens[:, :longest]
        has_text = mask.any(dim=1)
        valid = gather_features(has_text, gather)
        losses = [
            mlm_loss(self.vocabulary(tokens), batch["labels"], gather),
            sentence_alignment_loss(sentences, sentences.roll(1, -1), mask, has_text, gather=gather),
            mim_loss(x, batch["x"], batch["voxels"], gather=gather),
            mim_loss(x, batch["x"], batch["voxels"], 0.5, gather),
            contrastive_loss(*self.head(x, batch["x"] + x.roll(1, -1), gather), valid),
            sentence_similarity_loss(sentences, batch["sentences"][:, :longest], mask, 0.5, 0.1, gather),
        ]
        return torch.stack(losses).sum()


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples = WORLD * BATCH
    labels = torch.randint(0, 7, (samples, SENTENCES), generator=generator)
    labels[BATCH:] = -100  # the second rank has no labelled position at all
    labels[:BATCH, 2:] = -100
    return {
        "x": torch.randn(samples, WIDTH, generator=generator),
        "sentences": torch.randn(samples, SENTENCES, WIDTH, generator=generator),
        "mask": torch.arange(SENTENCES) < torch.tensor(COUNTS).unsqueeze(1),
        "labels": labels,
        "voxels": torch.rand(samples, WIDTH, generator=generator) < 0.4,
    }


def local_part(index: int) -> dict[str, Tensor]:
    return {key: value[index * BATCH : (index + 1) * BATCH] for key, value in whole_batch().items()}


def run_tower(index: int, result: dict) -> None:
    """Loss averaged over the ranks, and gradients averaged by DistributedDataParallel."""
    model = DistributedDataParallel(Tower())
    loss = model(local_part(index), "global")
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    result["loss"] = mean / WORLD
    result["gradients"] = {name: p.grad for name, p in model.module.named_parameters()}


def run_published(index: int, golden_dir: str, result: dict) -> None:
    tensors, record = load_entry(Path(golden_dir), "itc_gather_two_ranks")
    head = ITCHead(record["config"]["D"], record["config"]["D"], record["config"]["temp"])
    head.load_state_dict(under(tensors, "state"))
    image, text = (tensors[f"rank{index}.in.{name}"].requires_grad_() for name in ("image", "text"))
    logits = head(image, text, "published_reference")
    loss = contrastive_loss(*logits)
    loss.backward()
    result["published"] = {
        "loss": loss.detach(),
        "logits_per_image": logits[0].detach(),
        "gradients": {"in.image": image.grad, "in.text": text.grad}
        | {f"param.{name}": p.grad for name, p in head.named_parameters()},
    }


def run_small_parts(index: int, result: dict) -> None:
    part = local_part(index)
    longest = int(part["mask"].sum(1).max())
    sentences, mask = gather_sentences(part["sentences"][:, :longest], part["mask"][:, :longest])
    result["sentences"], result["mask"] = sentences, mask
    result["local"] = gather_features(part["x"], "local").shape[0]
    result["local_mean"] = global_mean(torch.tensor(6.0), 2, "local").item()
    result["global_mean"] = global_mean(torch.tensor(6.0), 1 + index).item()
    moco, ssm = MoCoQueue(2 * WORLD * BATCH, WIDTH), MoCoSentenceQueue(32, WIDTH, WIDTH)
    moco.enqueue(part["x"], part["x"], "global")
    ssm.enqueue_sentences(part["sentences"], part["sentences"], part["mask"], "global")
    result["moco"], result["ssm_pointer"] = moco.queue_1[: WORLD * BATCH], int(ssm.queue_1_ptr)


def worker(index: int, folder: str, golden_dir: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    result: dict = {"rank": rank(), "world_size": world_size()}
    run_tower(index, result)
    run_published(index, golden_dir, result)
    run_small_parts(index, result)
    torch.save(result, f"{folder}/rank{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, golden_dir) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder), str(golden_dir)), nprocs=WORLD)
    return [torch.load(folder / f"rank{index}.pt", weights_only=True) for index in range(WORLD)]


def test_two_processes_equal_one_with_twice_the_batch(ranks):
    tower = Tower()
    loss = tower(whole_batch(), "global")
    loss.backward()
    for result in ranks:
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in tower.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_published_gather_equals_golden(ranks, golden_dir):
    tensors, record = load_entry(golden_dir, "itc_gather_two_ranks")
    for index, result in enumerate(ranks):
        want = under(tensors, f"rank{index}")
        for name in ("loss", "logits_per_image"):
            torch.testing.assert_close(result["published"][name], want[name], rtol=1e-4, atol=1e-5)
        check_gradients(result["published"]["gradients"], under(want, "grad"), record)


def test_sentences_are_padded_to_the_longest_rank(ranks):
    batch = whole_batch()
    for result in ranks:
        assert torch.equal(result["mask"], batch["mask"])
        assert torch.equal(result["sentences"][result["mask"]], batch["sentences"][batch["mask"]])


def test_ranks_means_and_queues(ranks):
    assert [(r["rank"], r["world_size"]) for r in ranks] == [(0, 2), (1, 2)]
    assert all(r["local"] == BATCH and r["local_mean"] == 3.0 for r in ranks)
    assert all(r["global_mean"] == pytest.approx(6.0 * 2 / 3) for r in ranks)
    assert all(torch.equal(r["moco"], whole_batch()["x"]) for r in ranks)
    assert all(r["ssm_pointer"] == sum(COUNTS) for r in ranks)


def test_one_process_needs_no_group():
    x = torch.randn(2, 3)
    assert gather_features(x) is x and rank() == 0 and world_size() == 1
    assert global_mean(torch.tensor(6.0), 3).item() == 2.0
    assert global_mean(torch.tensor(0.0), 0).item() == 0.0
    with pytest.raises(ValueError, match="gather mode 'all'"):
        gather_features(x, "all")
