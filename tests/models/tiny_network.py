"""A network of a few thousand weights, random batches for it, and the recorded end-to-end step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel

from mg3d.mim_cells import cell_grid, random_cells, reference_cells
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import MG3DNetwork
from mg3d.models.options import NetworkOptions
from mg3d.models.vision_encoders import create_vision_encoder

VOLUME = (64, 32, 32)
TEXT_LEN, VOCAB, HIDDEN = 24, 60, 48


def bert_config(vocab: int = VOCAB, hidden: int = HIDDEN, layers: int = 2, **more: Any) -> BertConfig:
    sizes = {"num_attention_heads": 4, "intermediate_size": 2 * hidden, "max_position_embeddings": 64}
    return BertConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, **(sizes | more))


def tiny_network(frozen: bool = True, embed_dim: int = 6, **options: Any) -> MG3DNetwork:
    """Seeded network; keyword arguments are those of NetworkOptions."""
    torch.manual_seed(7)
    chosen = {"volume_size": VOLUME, "max_text_len": TEXT_LEN, "vocab_size": VOCAB, "hidden_size": HIDDEN} | options
    vision = create_vision_encoder(
        "swin_b", embed_dim=embed_dim, depths=(2, 1, 1), num_heads=(3, 6, 12), window_size=2, patch_size=4
    )
    return MG3DNetwork(vision, BertTextEncoder(BertModel(bert_config()), frozen=frozen), NetworkOptions(**chosen))


def enlarge(net: MG3DNetwork) -> MG3DNetwork:
    """Enlarge the small initial weights, so that every path counts and no norm divides by next to nothing."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.03:
                parameter *= 8.0
    return net


def _volumes(count: int, rng: torch.Generator) -> Tensor:
    """Volumes [count, D, 1, H, W] in [0, 1] with coarse structure and a little noise."""
    coarse = torch.rand(count, 1, *(size // 8 for size in VOLUME), generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="trilinear")
    return (0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=rng)).transpose(1, 2)


def hidden_cells(seed: int) -> Tensor:
    """Half of the cells of one volume, hidden."""
    return torch.from_numpy(random_cells(seed, cell_grid(VOLUME, 16), 0.5))


def tiny_batch(counts: tuple[int, ...] = (3, 1, 5), seed: int = 0, false_images: int = 0) -> dict[str, Any]:
    """Random batch in the layout of the collate function; a count of 0 is an empty report."""
    rng = torch.Generator().manual_seed(seed)
    studies, slots, words = len(counts), max(*counts, 1), 4
    ids = torch.zeros(studies, TEXT_LEN, dtype=torch.long)
    index = torch.full_like(ids, -1)
    sen_ids = torch.zeros(studies, slots, words + 2, dtype=torch.long)
    ids[:, 0] = 2
    for b, count in enumerate(counts):
        tokens = torch.randint(5, VOCAB, (count, words), generator=rng)
        ids[b, 1 : 1 + tokens.numel()] = tokens.flatten()
        ids[b, 1 + tokens.numel()] = 3
        index[b, 1 : 1 + tokens.numel()] = torch.arange(1, count + 1).repeat_interleave(words)
        sen_ids[b, :count] = torch.nn.functional.pad(tokens, (1, 1), value=3)
        sen_ids[b, :count, 0] = 2
    labels = torch.full_like(ids, -100)
    chosen = (index > 0) & (torch.rand(ids.shape, generator=rng) < 0.4)
    labels[chosen] = ids[chosen]
    batch = {
        "image": _volumes(studies, rng),
        "text_ids": ids,
        "text_masks": (ids != 0).long(),
        "text_ids_mlm": ids.masked_fill(chosen, 4),
        "text_labels_mlm": labels,
        "sentence_index": index,
        "sen_txt_ids": sen_ids,
        "sen_txt_masks": (sen_ids != 0).long(),
        "sentence_mask": torch.arange(slots)[None] < torch.tensor(counts)[:, None],
        "has_text": torch.tensor(counts) > 0,
        "mim_mask": torch.stack([hidden_cells(seed + study) for study in range(studies)]),
        "index": torch.arange(studies),
        "report_key": torch.arange(studies),
        "image_id": [f"study{b}" for b in range(studies)],
    }
    if false_images:
        batch["false_image"] = _volumes(studies * false_images, rng).unflatten(0, (studies, false_images))
    return batch


def take(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some studies of a batch, in the given order, padded no further than they need."""
    part = {k: v[rows] if isinstance(v, Tensor) else [v[row] for row in rows] for k, v in batch.items()}
    slots = max(int(part["sentence_mask"].sum(1).max()), 1)
    return part | {key: part[key][:, :slots] for key in ("sen_txt_ids", "sen_txt_masks", "sentence_mask")}


def total_loss(net: MG3DNetwork, batch: dict[str, Any]) -> Tensor:
    """Unweighted sum of all objectives."""
    return torch.stack([terms[f"{name}_loss"] for name, terms in net(batch).items()]).sum()


class RecordedStep:
    """The recorded tiny pre-training step: state, batch, intermediate tensors and numbers."""

    def __init__(self, golden_dir: Path) -> None:
        self.state = load_file(golden_dir / "e2e_tiny_state.safetensors")
        self.tensors = load_file(golden_dir / "e2e_tiny_io.safetensors")
        self.numbers = json.loads((golden_dir / "e2e_tiny_losses.json").read_text(encoding="utf-8"))
        records = json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))["entries"]
        self.record = next(record for record in records if record["name"] == "e2e_tiny_io")
        self.config = self.record["config"]
        self.batch = self._batch(load_file(golden_dir / "e2e_tiny_inputs.safetensors"))

    def _batch(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        batch: dict[str, Any] = {key: value for key, value in inputs.items() if not key.startswith("sen_txt")}
        lone = {tuple(map(int, key.split(".")[1:])): value[0] for key, value in inputs.items() if key[:7] == "sen_txt"}
        studies, slots = (1 + max(place[axis] for place in lone) for axis in (0, 1))
        ids = torch.zeros(studies, slots, max(len(value) for value in lone.values()), dtype=torch.long)
        masks = torch.zeros_like(ids)
        for (study, slot), value in lone.items():
            ids[study, slot, : len(value)] = value
            masks[study, slot, : len(value)] = 1
        mask = self.config["mask"]
        grid = cell_grid(self.config["image_dhw"], mask["window"])
        cells = torch.from_numpy(reference_cells(grid, mask["ratio"], np.random.RandomState(mask["numpy_seed"])))
        image = batch.pop("image_u8").float() / 255
        lone_part = {"sen_txt_ids": ids, "sen_txt_masks": masks, "sentence_mask": masks.any(2)}
        return batch | lone_part | {"image": image, "mim_mask": cells.expand(studies, -1, -1, -1)}

    def network(self, **options: Any) -> MG3DNetwork:
        """Network of the recorded sizes, not yet with its state."""
        config = self.config
        bert = bert_config(
            config["vocab_size"],
            config["hidden_size"],
            config["text_layers"],
            num_attention_heads=config["text_heads"],
            intermediate_size=config["text_intermediate"],
            max_position_embeddings=config["max_position_embeddings"],
        )
        vision = create_vision_encoder("swin_b", embed_dim=config["embed_dim"])
        sizes = {
            "volume_size": tuple(config["image_dhw"]),
            "max_text_len": config["text_len"],
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
        }
        return MG3DNetwork(vision, BertTextEncoder(BertModel(bert)), NetworkOptions(**(sizes | options)))

    def loaded(self, mode: str) -> MG3DNetwork:
        """Network with the recorded state in eval mode; mode is "projected" or "encoder"."""
        reuse = {"projected": "projected_reference", "encoder": "encoder"}[mode]
        net = self.network(image_feature_reuse=reuse)
        net.load_state_dict(self.state, strict=True)
        return net.eval()
