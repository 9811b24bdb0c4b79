"""Report generation with and without the cache of keys and values, on the CPU: 64 reports, beam 3.

The generator has the published sizes and random weights; without a cache every step decodes the whole prefix of every
beam again, as the published code does. Both take turns; the ratio is that of the fastest rounds, and both must write
the same reports. The ratio grows with the reports' length: reports of CTRG have 115 words on average, which take
minutes a round without the cache, and the default is shorter. The last line is one JSON object.

    python benchmarks/generate.py [--reports 64] [--beams 3] [--words 40] [--rounds 3] [--threads 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import MIN_ROUNDS, Timing, interleave

PUBLISHED_WORDS = 1028
PATCHES = 27


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both ways and compare what they write."""
    import torch

    from mg3d.models.finetune.beam_search import Hypotheses, SearchOptions
    from mg3d.models.finetune.memory_generator import GeneratorOptions, MemoryGenerator

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = MemoryGenerator(GeneratorOptions(words=PUBLISHED_WORDS)).eval()
    feat_BPF = torch.randn(options.reports, PATCHES, model.options.feature_width)
    search = SearchOptions(beams=options.beams, max_words=options.words, min_words=options.words, block_trigrams=True)
    found: dict[str, Hypotheses] = {}

    def run(name: str) -> None:
        found[name] = model.generate(feat_BPF, feat_BPF.mean(dim=1), search, cached=name == "cached")

    timings = interleave({"cached": lambda: run("cached"), "prefix": lambda: run("prefix")}, options.rounds)
    fastest = Timing.fastest(timings, "wall")
    for name, rounds in timings.items():
        print(f"{name:8s} rounds: {', '.join(f'{each.wall:.2f}' for each in rounds)} s")
    return {
        "reports": options.reports,
        "beams": options.beams,
        "words": options.words,
        "threads": torch.get_num_threads(),
        "cached_s": round(fastest["cached"], 3),
        "prefix_s": round(fastest["prefix"], 3),
        "speedup": round(fastest["prefix"] / fastest["cached"], 2),
        "same_output": bool(torch.equal(found["cached"].ids, found["prefix"].ids)),
        "largest_score_difference": float((found["cached"].scores - found["prefix"].scores).abs().max()),
    }


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=64, help="reports written in one batch")
    parser.add_argument("--beams", type=int, default=3, help="hypotheses kept for each report")
    parser.add_argument("--words", type=int, default=40, help="words of each report")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="interleaved rounds, at least 3")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
