"""The contrastive head on several processes."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mg3d.models.heads import ITCHead
from mg3d.models.losses import contrastive_loss
from tools.golden.adapters.common import loaded
from tools.golden.bundle import Bundle

GATHER = {"published": "published_reference"}
TIMEOUT = timedelta(seconds=60)


def _worker(rank: int, job: dict[str, Any], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", job["world_size"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job["world_size"], timeout=TIMEOUT)
    projected, width = job["state"]["vision_proj.weight"].shape
    head = loaded(ITCHead(width, projected, job["temperature"]), job["state"])
    inputs = {name: value.requires_grad_() for name, value in job["inputs"][rank].items()}
    per_image, per_text = head(inputs["image"], inputs["text"], gather=job["gather"])
    loss = contrastive_loss(per_image, per_text)
    leaves = {f"grad.in.{name}": value for name, value in inputs.items()}
    leaves |= {f"grad.param.{name}": value for name, value in head.named_parameters()}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    result = {"loss": loss.detach(), "logits_per_image": per_image.detach()}
    torch.save(result | dict(zip(leaves, gradients, strict=True)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def gathered_contrast(bundle: Bundle) -> None:
    """Every process's loss, logits and gradients under the stored way of gathering."""
    ranks = range(bundle.options["world_size"])
    mode = bundle.options["gather"].split(":")[0]
    job = {
        "world_size": len(ranks),
        "gather": GATHER.get(mode, mode),
        "temperature": bundle.config["temp"],
        "state": bundle.state(),
        "inputs": [{name: bundle.read(f"rank{rank}.in.{name}") for name in ("image", "text")} for rank in ranks],
    }
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(job, folder), nprocs=len(ranks))
        for rank in ranks:
            values = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            for name, value in values.items():
                bundle.check(f"rank{rank}.{name}", value, gradient=name.startswith("grad."))
