"""Scores of reports with volumes through the cross-attention, from cached features: in batches and pair by pair.

Features and weights are random. Pair by pair is what the published script does; as that takes an hour at its sizes, a
sample of the pairs is run and the time of all follows from it (--every-pair runs them all). The scores of those pairs
must agree. The last line is one JSON object.

    python benchmarks/retrieval.py [--reports 400] [--volumes 400] [--width 768] [--tokens 48] [--every-pair]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def build(width: int, tokens: int) -> Any:
    """A network of the published sizes whose encoders are left out: their features are given."""
    import torch
    from torch import nn

    from mg3d.models.finetune.vocabulary import VocabularyNetwork, VocabularyOptions

    class Encoder(nn.Module):
        out_channels = width
        embed_dim = width

        def token_grid(self, size_dhw: tuple[int, int, int]) -> tuple[int, int, int]:
            return tokens, 1, 1

    torch.manual_seed(0)
    options = VocabularyOptions(size_dhw=(128, 128, 96), width=width, latent=width, project=False)
    return VocabularyNetwork(Encoder(), Encoder(), options).eval()  # type: ignore[arg-type]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both ways and compare their scores."""
    import torch

    from mg3d.models.finetune.pairwise import naive_scores, pairwise_scores

    if options.threads:
        torch.set_num_threads(options.threads)
    network = build(options.width, options.tokens)
    texts = torch.randn(options.reports, options.width)
    images = torch.randn(options.volumes, options.tokens, options.width)
    rows = options.reports if options.every_pair else min(options.sample, options.reports)
    columns = options.volumes if options.every_pair else min(options.sample, options.volumes)
    naive_scores(network, texts[:1], images[:2])
    start = time.perf_counter()
    slow = naive_scores(network, texts[:rows], images[:columns])
    naive_s = time.perf_counter() - start
    start = time.perf_counter()
    fast = pairwise_scores(network, texts, images)
    batched_s = time.perf_counter() - start
    naive_all_s = naive_s / (rows * columns) * options.reports * options.volumes
    return {
        "reports": options.reports,
        "volumes": options.volumes,
        "width": options.width,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "batched_s": round(batched_s, 3),
        "naive_pairs_run": rows * columns,
        "naive_s": round(naive_all_s, 1),
        "speedup": round(naive_all_s / batched_s, 1),
        "largest_score_difference": float((fast[:rows, :columns] - slow).abs().max()),
    }


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=400, help="reports that ask (%(default)s)")
    parser.add_argument("--volumes", type=int, default=400, help="volumes that answer (%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="channels (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a volume (%(default)s)")
    parser.add_argument("--sample", type=int, default=25, help="reports and volumes run pair by pair (%(default)s)")
    parser.add_argument("--every-pair", action="store_true", help="run all of them pair by pair")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
