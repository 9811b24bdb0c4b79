"""Every registered encoder takes part in every pre-training objective and learns."""

from __future__ import annotations

import pytest
import torch
from tiny_network import HIDDEN, TEXT_LEN, VOCAB, VOLUME, bert_config, tiny_batch, total_loss
from transformers import BertConfig, BertModel

from mg3d.config_schema import TINY_ENCODERS
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives import OBJECTIVES
from mg3d.models.options import NetworkOptions
from mg3d.models.vision_encoders import VISION_ENCODERS, create_vision_encoder

EVERY = pytest.mark.parametrize("name", sorted(VISION_ENCODERS))


def network(name: str) -> MG3DNetwork:
    torch.manual_seed(1)
    options = NetworkOptions(
        volume_size=VOLUME, max_text_len=TEXT_LEN, vocab_size=VOCAB, hidden_size=HIDDEN, objectives=tuple(OBJECTIVES)
    )
    vision = create_vision_encoder(name, patch_merging="fixed", **TINY_ENCODERS[name])
    return MG3DNetwork(vision, BertTextEncoder(BertModel(bert_config())), options)


@EVERY
def test_all_objectives_reach_the_encoder_and_it_learns(name: str) -> None:
    net, batch = network(name), tiny_batch(false_images=1)
    before = {key: value.clone() for key, value in net.vision_encoder.named_parameters()}
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = total_loss(net, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        for key, value in net.vision_encoder.named_parameters():
            assert value.grad is not None and bool(value.grad.isfinite().all()), key
        optimizer.step()
    assert losses[-1] < losses[0]
    assert set(net(batch)) == set(OBJECTIVES)
    # a bias before a norm has no effect; everything else must have moved
    still = [key for key, value in net.vision_encoder.named_parameters() if torch.equal(value, before[key])]
    assert all(key.endswith(".bias") for key in still), still


@EVERY
@pytest.mark.parametrize("size", [(128, 96, 128), (64, 160, 160)])
def test_heads_take_the_token_grid_and_width_of_the_published_sizes(name: str, size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        vision = create_vision_encoder(name)
        text = BertTextEncoder(BertModel(BertConfig(hidden_size=48, num_attention_heads=4, intermediate_size=48)))
        net = MG3DNetwork(vision, text, NetworkOptions(volume_size=size, objectives=tuple(OBJECTIVES)))
        grid = vision.token_grid(size)
        count = grid[0] * grid[1] * grid[2]
        image = net.project_image(torch.empty(1, count, vision.out_channels))
        assert net.uni_modal_vision_pooler(image).shape == (1, 768)
        rebuilt = net.mim_swin_unter_head(image.transpose(1, 2).unflatten(2, grid))
    assert net.multi_modal_vision_proj.in_features == (320 if name.startswith("nnunet") else 768)
    assert rebuilt.shape == (1, 1, *size)
