"""The benchmark of the training step at a tiny size: it measures the real step, splits it, and its forms agree."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Timing, interleave
from benchmarks.loop_fusion import FORMS, FusionLayers
from benchmarks.step_parts import PARTS, PartClock
from benchmarks.step_setup import SIZES, TrainingStep, make_batch

TINY = SIZES["tiny"]


def test_published_sizes() -> None:
    sizes = SIZES["published"]
    assert (sizes.volume, sizes.text_len, sizes.sentences) == ((128, 96, 128), 250, 20)
    assert (sizes.embed_dim, sizes.hidden, sizes.text_layers) == (48, 768, 12)


def test_batch_has_all_sentences_and_labels_only_where_words_are_masked() -> None:
    torch.manual_seed(0)
    batch = make_batch(TINY, studies=2)
    assert batch["sentence_index"].amax(dim=1).tolist() == [TINY.sentences] * 2
    masked = batch["text_labels_mlm"] != -100
    assert masked.any() and torch.equal(batch["text_ids_mlm"] != batch["text_ids"], masked)
    assert torch.equal(batch["text_labels_mlm"][masked], batch["text_ids"][masked])
    assert batch["sen_txt_ids"].shape[1] == TINY.sentences


def test_step_trains_and_frees_the_gradients() -> None:
    step = TrainingStep(TINY, studies=1, checkpointed=False)
    before = step.net.mlm_head.decoder.weight.detach().clone()
    assert step() > 0
    assert not torch.equal(before, step.net.mlm_head.decoder.weight)
    assert all(parameter.grad is None for parameter in step.net.parameters())


def test_clock_splits_a_step_without_changing_it() -> None:
    plain, timed = (TrainingStep(TINY, studies=2, checkpointed=False) for _ in range(2))
    clock = PartClock()
    clock.attach(timed.net)
    start = time.perf_counter()
    clock.restart()
    loss = timed.losses()
    clock.switch("optimiser")
    clock.switch("losses")
    assert 0 < sum(clock.seconds.values()) <= time.perf_counter() - start
    assert set(clock.seconds) == set(PARTS) and min(clock.seconds.values()) > 0
    assert plain.losses() == pytest.approx(loss, rel=1e-6)
    for one, other in zip(plain.net.parameters(), timed.net.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


class _SlowBackward(torch.autograd.Function):
    """Identity that sleeps in its backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(0.2)
        return grad


def test_clock_charges_the_backward_pass_to_its_part() -> None:
    step = TrainingStep(TINY, studies=1, checkpointed=False)
    head, inner = step.net.mim_swin_unter_head, step.net.mim_swin_unter_head.forward
    head.forward = lambda grid: _SlowBackward.apply(inner(_SlowBackward.apply(grid)))  # type: ignore[method-assign]
    clock = PartClock()
    clock.attach(step.net)
    clock.restart()
    step.losses()
    clock.switch("losses")
    assert clock.seconds["heads"] >= 0.4


@pytest.mark.parametrize("form", [name for name in FORMS if name != "closed"])
def test_loops_agree_with_the_closed_form(form: str) -> None:
    torch.manual_seed(1)
    layers = FusionLayers(TINY.hidden, TINY.text_len, 3).double()
    text = torch.randn(2, TINY.text_len, TINY.hidden, dtype=torch.double)
    image = torch.randn(2, 3, TINY.hidden, dtype=torch.double)
    index = make_batch(TINY, 2)["sentence_index"]
    found, expected = (FORMS[name](layers, text, image, index) for name in (form, "closed"))
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_turns_alternate_and_the_first_ones_do_not_count() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4 and [len(found) for found in timings.values()] == [3, 3]
    assert Timing.fastest({"a": [Timing(2.0, 1.0), Timing(1.5, 1.2)]}, "cpu") == {"a": 1.0}


@pytest.mark.slow
def test_command_prints_one_json_object_last(repository: Path) -> None:
    command = [sys.executable, "benchmarks/pretrain_step.py", "--size", "tiny", "--threads", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=True, timeout=600)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("step_s", "overhead_ratio", "peak_gib", "peak_gib_checkpointed", "fusion_speedup"):
        assert found[key] > 0
    assert set(found["parts_s"]) == set(PARTS) and found["fusion_difference"] < 1e-4
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"], rel=0.05)
    assert found["peak_gib"] > found["peak_gib_beyond_imports"] > 0
