"""Scores of reports with volumes through the cross-attention, from cached features: in batches and pair by pair.

Features and weights are random. Pair by pair is what the published script does; at its sizes that takes about an hour,
so a block of the pairs is run and the time of all of them is that of a pair times their number: the answer then says
"naive_extrapolated": true. --every-pair runs them all; that fits 60 x 60 at the published width (3,600 pairs), and
400 x 400 at --width 32 --tokens 4. "speedup" compares the time of all pairs, "speedup_same_pairs" the measured times
of both ways for the pairs that were run, with nothing extrapolated. The scores of those pairs must agree. The last
line is one JSON object.

    python benchmarks/retrieval.py [--reports 400] [--volumes 400] [--width 768] [--tokens 48] [--sample 40]
    python benchmarks/retrieval.py --reports 60 --volumes 60 --every-pair
    python benchmarks/retrieval.py --width 32 --tokens 4 --every-pair
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
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


def timed(run: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """Result and median seconds of a call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds)


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
    pairwise_scores(network, texts[:2], images[:2])
    each = [timed(lambda text=text: naive_scores(network, text[None], images[:columns]), 1) for text in texts[:rows]]
    slow, seconds = torch.cat([scores for scores, _ in each]), [taken for _, taken in each]
    fast, batched_s = timed(lambda: pairwise_scores(network, texts, images), options.rounds)
    same_s = batched_s
    if not options.every_pair:
        _, same_s = timed(lambda: pairwise_scores(network, texts[:rows], images[:columns]), options.rounds)
    run, pairs = rows * columns, options.reports * options.volumes
    naive_s = sum(seconds)
    return {
        "reports": options.reports,
        "volumes": options.volumes,
        "width": options.width,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "batched_s": round(batched_s, 3),
        "naive_pairs_run": run,
        "naive_run_s": round(naive_s, 5),
        "naive_ms_a_pair": round(1e3 * naive_s / run, 3),
        "naive_ms_a_pair_by_report": [round(1e3 * value(seconds) / columns, 3) for value in (min, max)],
        "naive_extrapolated": run < pairs,
        "naive_s": round(naive_s / run * pairs, 3),
        "speedup": round(naive_s / run * pairs / batched_s, 1),
        "speedup_same_pairs": round(naive_s / same_s, 1),
        "largest_score_difference": float((fast[:rows, :columns] - slow).abs().max()),
    }


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=400, help="reports that ask (%(default)s)")
    parser.add_argument("--volumes", type=int, default=400, help="volumes that answer (%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="channels (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a volume (%(default)s)")
    parser.add_argument("--sample", type=int, default=40, help="reports and volumes run pair by pair (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of the batches, median (%(default)s)")
    parser.add_argument("--every-pair", action="store_true", help="run all of them pair by pair")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
