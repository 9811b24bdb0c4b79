"""What a name of weights stands for: a file, an export folder, a run folder, a model of the hub, an architecture."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mg3d.errors import CheckpointError

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_ALIASES = {"swin_base": "swin_b", "swin_large": "swin_l"}


@dataclass(frozen=True)
class Place:
    """Where weights are.

    Attributes:
        kind: ``folder`` (export), ``file``, or ``architecture`` (no weights).
        path: the folder or file; of an architecture, its registry name.
        name: what the user wrote.
    """

    kind: Literal["folder", "file", "architecture"]
    path: Path
    name: str


def find_weights(name_or_path: str | Path) -> Place:
    """Resolve a name, downloading an export folder if it names a model of the hub.

    Args:
        name_or_path: weights file, export folder, run folder (its last checkpoint), ``org/name`` on the hub, or an
            architecture such as ``swin_b``.

    Raises:
        CheckpointError: nothing of that name, or a folder without weights.
        EnvironmentProblem: a hub id, and the hub does not answer.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_file():
        return Place("file", path, name)
    if path.is_dir():
        return _inside(path, name)
    if architecture := architecture_name(name):
        return Place("architecture", Path(architecture), name)
    if _HUB_ID.fullmatch(name) and not path.suffix:
        from mg3d.inference.hub import download_export

        return _inside(download_export(name), name)
    raise CheckpointError(f"no weights at {name}", _mend(name))


def architecture_name(name: str) -> str | None:
    """Registry name of an architecture (``swin_base`` is also accepted); None for anything else."""
    from mg3d.config_schema import VISION_ENCODERS

    name = _ALIASES.get(name, name)
    return name if name in VISION_ENCODERS else None


def _inside(folder: Path, name: str) -> Place:
    if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
        return Place("folder", folder, name)
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: (path.name == LAST, path.stat().st_mtime))
    if checkpoints:
        return Place("file", checkpoints[-1], name)
    content = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
    raise CheckpointError(
        f"{folder} is no export folder and no run folder (it holds {content})",
        f"name a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, a run folder with checkpoints/, or a single file",
    )


def _mend(name: str) -> str:
    from mg3d.config_schema import VISION_ENCODERS

    nearest = difflib.get_close_matches(name, VISION_ENCODERS, n=1, cutoff=0.6)
    hint = f"did you mean the architecture {nearest[0]!r} (random_init=True)? " if nearest else ""
    return f"{hint}give a weights file, an export or run folder, or a hub id org/name"
