"""Tiny weights as training, export and other programs write them, and scans that look like a chest."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from mg3d.datasets.report_text import wordpiece_tokenizer_from_vocab
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.models.checkpoint import describe_weights
from mg3d.models.export import export_folder
from mg3d.models.network import MG3DNetwork
from tests.models.checkpoint_files import training_metadata
from tests.models.tiny_network import VOCAB, enlarge, tiny_network

OBJECTIVES = ("sen_mlm", "swin_unetr_mim", "local_itc")
WORDS = ["no", "pleural", "effusion", "cardiomegaly", "is", "present", "lungs", "clear", "nodule", "the", "heart", "."]
SPACING_ZYX = (6.0, 8.0, 8.5)


def vocabulary() -> list[str]:
    """As many entries as the tiny network has."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return words + [f"word{number}" for number in range(VOCAB - len(words))]


def network(shared: bool = True) -> MG3DNetwork:
    """Seeded network whose every path counts, in evaluation mode."""
    made = enlarge(tiny_network(objectives=(*OBJECTIVES, "itc") if shared else OBJECTIVES, itc_embed_dim=12))
    if shared:
        head = made.image_text_itc_head
        rng = torch.Generator().manual_seed(3)
        for norm in (head.image_norm, head.text_norm):
            norm.mean += 0.1 * torch.randn(norm.mean.shape, generator=rng)
    return made.eval()


def checkpoint(folder: Path, shared: bool = True, **changes: object) -> Path:
    """A Lightning-like checkpoint and its tokenizer in ``folder/text``; changes replace metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    wordpiece_tokenizer_from_vocab(vocabulary()).save_pretrained(folder / "text")
    made = network(shared)
    facts = training_metadata(made, str(folder / "text")) | {"options": options_of(made)}
    metadata = describe_weights(made, **facts, **published_geometry()) | changes
    torch.save({"state_dict": made.state_dict(), "mg3d_metadata": metadata}, folder / "last.ckpt")
    return folder / "last.ckpt"


def options_of(made: MG3DNetwork) -> dict[str, object]:
    """The network's options as a checkpoint stores them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(made.options).items()}


def export(folder: Path, shared: bool = True) -> Path:
    """The same weights as an export folder."""
    return export_folder(checkpoint(folder / "run", shared), folder / "export")


def chest_hu(seed: int = 0, shape_dhw: tuple[int, int, int] = (40, 36, 38)) -> np.ndarray:
    """[D, H, W] int16: a body with two lungs in air, and some noise."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape_dhw), indexing="ij")
    hu = np.full(shape_dhw, -1000.0)
    hu[(x / 0.9) ** 2 + (y / 0.75) ** 2 < 1] = 40
    for side in (-0.42, 0.42):
        hu[((x - side) / 0.3) ** 2 + (y / 0.5) ** 2 + (z / 0.9) ** 2 < 1] = -850 + 20 * seed
    return np.rint(hu + rng.normal(0, 15, shape_dhw)).astype(np.int16)


def save_nifti(path: Path, hu_dhw: np.ndarray, spacing_zyx: tuple[float, float, float] = SPACING_ZYX) -> Path:
    """Write [D, H, W] in LPS order as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing_zyx[2], -spacing_zyx[1], spacing_zyx[0], 1.0])
    nib.save(nib.Nifti1Image(np.ascontiguousarray(hu_dhw.transpose(2, 1, 0)), affine), path)
    return path


def volumes(count: int = 2, seed: int = 0) -> Tensor:
    """[count, 1, 64, 32, 32] in [0, 1]."""
    return torch.rand(count, 1, 64, 32, 32, generator=torch.Generator().manual_seed(seed))
