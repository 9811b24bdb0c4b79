"""The encoder table at a tiny size: the subjects do the same work, the table says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.encoder_subject import MonaiTokens, build, count, measure
from benchmarks.encoder_table import MODES, MONAI, TITLES, markdown, summarise

SIZE = (32, 32, 64)


def test_monais_row_is_swin_b_with_the_same_weights_and_tokens() -> None:
    monai, ours = build(MONAI).eval(), build("swin_b", patch_merging="fixed").eval()
    assert isinstance(monai, MonaiTokens)
    assert sum(parameter.numel() for parameter in monai.parameters()) == 8062002
    lacking, unknown = monai.swin.load_state_dict(ours.state_dict(), strict=False)
    assert not unknown and all(name.endswith("relative_position_index") for name in lacking)
    volume = torch.rand(1, 1, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(ours.tokens(volume), monai.tokens(volume), rtol=1e-3, atol=1e-4)


def test_operations_are_those_of_the_convolutions() -> None:
    encoder = build("unet", base_width=2)
    widths = [(1, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32)]
    voxels = [32 * 32 * 64 // 8 ** (index // 2) for index in range(8)]
    wanted = sum(2 * 27 * one * other * place for (one, other), place in zip(widths, voxels, strict=True))
    found = count(encoder, torch.rand(1, 1, *SIZE))
    assert found["gflops"] == pytest.approx(wanted / 1e9) and found["tokens"] == [2, 32]


def test_rows_hold_the_smallest_time_the_largest_memory_and_the_ratio() -> None:
    found = {
        name: {mode: [measure(name, mode, SIZE, **options) for _ in range(2)] for mode in MODES}
        for name, options in (("unet_pcrlv2", {"base_width": 1}), ("unet", {"base_width": 2}))
    }
    found = {MONAI: found.pop("unet_pcrlv2"), **found}  # a quick stand-in
    rows = summarise(found)
    for name, row in rows.items():
        for mode in MODES:
            assert row[f"{mode}_wall_s"] == min(each["wall_s"] for each in found[name][mode]) > 0
            assert row[f"{mode}_peak_gib"] == pytest.approx(max(e["peak_gib"] for e in found[name][mode]), abs=1e-3)
            ratio = row[f"{mode}_wall_s"] / rows[MONAI][f"{mode}_wall_s"]
            assert row[f"{mode}_wall_against_monai"] == pytest.approx(ratio, abs=1e-3)
    assert rows[MONAI]["tokens"] == [2, 16] and rows["unet"]["tokens"] == [2, 32]
    lines = markdown(rows).splitlines()
    assert len(lines) == 4 and all(line.count("|") == len(TITLES) + 1 for line in lines)
    assert (
        lines[2].startswith("| MONAI") and "| 1.00x |" in lines[2] and lines[3].startswith("| `unet` | 0.0 | 2 x 32 |")
    )


@pytest.mark.slow
def test_command_prints_one_json_object_last(repository: Path) -> None:
    command = [sys.executable, "benchmarks/encoder_table.py", "--rounds", "1", "--threads", "1", "--size", "32x32x64"]
    done = subprocess.run(
        [*command, "--encoders", "nnunet"],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=600,
    )
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1])
    assert set(found["encoders"]) == {MONAI, "nnunet"} and found["encoders"]["nnunet"]["tokens"] == [2, 320]
    assert lines[0].startswith("| encoder |") and found["threads"] == 1
