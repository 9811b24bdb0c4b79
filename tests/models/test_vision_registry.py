from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mg3d.errors import ConfigError
from mg3d.models.vision_encoders import VISION_ENCODERS, create_vision_encoder

SMALL = {"swin_b": {"embed_dim": 3}, "swin_l": {"embed_dim": 3, "proj_out_dim": 8}}


@pytest.mark.parametrize("name", sorted(VISION_ENCODERS))
def test_every_name_builds_and_describes_itself(name: str) -> None:
    encoder = create_vision_encoder(name, **SMALL.get(name, {"base_width": 1}))
    assert encoder.metadata()["name"] == name == encoder.name
    assert encoder.token_grid((128, 96, 128)) == (4, 3, 4)


def test_unknown_name_lists_all_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="swin_x") as caught:
        create_vision_encoder("swin_x")
    assert isinstance(caught.value, ConfigError)
    assert "did you mean 'swin_" in str(caught.value)
    assert all(name in str(caught.value) for name in VISION_ENCODERS)


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"embed_dims.*\n.*'embed_dim'"):
        create_vision_encoder("swin_b", embed_dims=12)
    with pytest.raises(ValueError, match="base_width"):
        create_vision_encoder("unet", embed_dim=12)


def test_naming_encoders_does_not_import_their_libraries(repository: Path) -> None:
    code = "import sys; from mg3d.models.vision_encoders import VISION_ENCODERS; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
