from __future__ import annotations

import pytest
import torch
from golden_support import load_entry, under

from mg3d.models.memory_queues import CrossBatchMemory, MoCoQueue, MoCoSentenceQueue


@pytest.mark.parametrize("kind", ["moco", "moco_ssm"])
def test_golden_ring_buffers(golden_dir, kind):
    tensors, record = load_entry(golden_dir, "memory_queues")
    # The recorded moco.init holds the final content, so the start is what the first step left in place.
    start = {name: tensors[f"{kind}.after0.{name}"].clone() for name in ("queue_1", "queue_2")}
    for bank in start.values():
        bank[: len(tensors[f"{kind}.in1.0"])] = 0.0
    size, widths = record["config"]["K"], [bank.shape[1] for bank in start.values()]
    queue = MoCoQueue(size, widths[0]) if kind == "moco" else MoCoSentenceQueue(size, *widths)
    pointers = {name: torch.zeros(1).long() for name in ("queue_1_ptr", "queue_2_ptr")}
    queue.load_state_dict(start | pointers, strict=True)
    for step in range(len(under(tensors, f"{kind}.in1"))):
        queue.enqueue(tensors[f"{kind}.in1.{step}"], tensors[f"{kind}.in2.{step}"])
        want = under(tensors, f"{kind}.after{step}")
        assert torch.equal(queue.queue_1, want["queue_1"]) and torch.equal(queue.queue_2, want["queue_2"])
        assert [int(queue.queue_1_ptr), int(queue.queue_2_ptr)] == want["ptr"].tolist()


def test_golden_cross_batch_memory(golden_dir):
    tensors, record = load_entry(golden_dir, "memory_queues")
    memory = CrossBatchMemory(record["config"]["K"], tensors["xbm.in1.0"].shape[1], tensors["xbm.in2.0"].shape[1])
    assert memory.get()[0].shape[0] == 0
    for step in range(len(under(tensors, "xbm.in1"))):
        memory.enqueue(tensors[f"xbm.in1.{step}"], tensors[f"xbm.in2.{step}"])
        want = under(tensors, f"xbm.after{step}")
        got_1, got_2 = memory.get()
        assert torch.equal(got_1, want["get_1"]) and torch.equal(got_2, want["get_2"])
        assert int(memory.queue_ptr) == int(want["ptr"])


def test_moco_starts_with_normalised_columns():
    queue = MoCoQueue(16, 3)
    torch.testing.assert_close(queue.queue_1.norm(dim=0), torch.ones(3))


def test_state_resumes_exactly():
    memory = CrossBatchMemory(4, 2)
    memory.enqueue(torch.ones(4, 2), torch.zeros(4, 2))
    again = CrossBatchMemory(4, 2)
    again.load_state_dict(memory.state_dict())
    assert again.get()[0].shape == (4, 2)


def test_keys_carry_no_graph_and_stored_rows_are_copies():
    queue = MoCoQueue(4, 2)
    keys = torch.ones(2, 2, requires_grad=True)
    queue.enqueue(keys, keys)
    bank, _ = queue.get()
    queue.enqueue(2 * keys, 2 * keys)
    queue.enqueue(3 * keys, 3 * keys)
    assert not bank.requires_grad and bank[0].tolist() == [1.0, 1.0]


def test_padded_sentences_store_only_the_valid_ones():
    queue = MoCoSentenceQueue(4, 2, 3)
    mask = torch.tensor([[True, False], [True, True]])
    queue.enqueue_sentences(torch.ones(2, 2, 2), torch.ones(2, 2, 3), mask)
    assert int(queue.queue_1_ptr) == 3 and queue.queue_2[:3].eq(1).all()


def test_refusals():
    with pytest.raises(ValueError, match="not a multiple"):
        MoCoQueue(4, 2).enqueue(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="exceed the queue size"):
        MoCoSentenceQueue(4, 2, 2).enqueue(torch.ones(5, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="exceed the memory size"):
        CrossBatchMemory(4, 2).enqueue(torch.ones(5, 2), torch.ones(5, 2))
