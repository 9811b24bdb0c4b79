"""CT-RATE from its command with Swin-L and CT-CLIP's text side: what the run loads, reports and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from folders import load_folder
from transformers import BertConfig, BertModel

from mg3d.finetuning.experiment import run_benchmark
from mg3d.phantoms.downstream.ct_rate import write_ct_rate


def test_a_run_of_swin_l_takes_the_text_side_of_ct_clip(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_ct_rate(data, train=6, valid=3, size=32, seed=3)
    torch.manual_seed(7)
    text = BertModel(BertConfig.from_pretrained(data / "text_encoder")).state_dict()
    stored = {f"text_transformer.{name}": value for name, value in text.items()}
    stored |= {"to_text_latent.weight": torch.randn(24, 96), "visual_transformer.vq.embed": torch.zeros(2)}
    torch.save({**stored, "temperature": torch.tensor(0.5)}, tmp_path / "ctclip.pt")
    places = [f"data_root={data}", f"work_dir={tmp_path / 'work'}", f"log_dir={tmp_path / 'log'}"]
    sizes = ["encoder=swin_l", "feature_size=12", "roi=[32,32,32]", "width=96", "latent=24", "project=False"]
    quick = ["max_epoch=1", "bootstrap_rounds=2", "pictures=False", "num_gpus=0", "num_workers=0", "batch_size=4"]
    line = ["with", *places, *sizes, *quick, f"text_weights={tmp_path / 'ctclip.pt'}", "stages=train,evaluate"]
    assert run_benchmark(load_folder("CT-RATE").BENCHMARK, line) == 0
    (run_dir,) = (tmp_path / "log").glob("*/version_0")
    report = json.loads((run_dir / "text_weights_report.json").read_text(encoding="utf-8"))
    assert report["family"] == "ct_clip" and "to_text_latent.weight" in report["loaded"]
    assert "CTViT" in report["dropped"]["visual_transformer.vq.embed"]
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    state, metadata = checkpoint["state_dict"], checkpoint["mg3d_metadata"]
    for name, value in text.items():
        assert torch.equal(state[f"network.language_encoder.{name}"], value)
    assert metadata["network"]["image_tokens"] == "two_sets"
    assert state["network.to_visual_latent.weight"].shape == (24, 2 * 1 * 96)
    assert not torch.equal(state["network.to_text_latent.weight"], stored["to_text_latent.weight"])  # it learns
    assert "network.visual.encoder.proj_head.layer3.0.weight" in state
