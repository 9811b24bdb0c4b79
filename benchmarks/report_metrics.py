"""Seconds to score generated reports with BLEU-1..4, ROUGE-L and CIDEr, beside pycocoevalcap on the same tokens.

    python -m benchmarks.report_metrics                     1,564 random reports of CT-RATE's length
    python -m benchmarks.report_metrics --cases 300 --rounds 3

Rounds alternate between the two; the fastest of each counts, and the speedup compares processor time. The last line of
standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random

from benchmarks.harness import MIN_ROUNDS, Timing, interleave
from mg3d.metrics.captioning import score_captions

Pairs = tuple[list[list[str]], list[str]]


def draw(cases: int, words: int, seed: int = 0) -> Pairs:
    """References of random length around ``words`` and hypotheses that keep about seven words in ten."""
    rng = random.Random(seed)
    vocabulary = [f"word{number}" for number in range(3000)]
    weights = [1 / (number + 3) for number in range(3000)]
    lengths = [max(20, round(rng.gauss(words, words / 3))) for _ in range(cases)]
    references = [rng.choices(vocabulary, weights, k=length) for length in lengths]
    hypotheses = [
        " ".join(word if rng.random() < 0.7 else rng.choice(vocabulary) for word in text) for text in references
    ]
    return [[" ".join(text)] for text in references], hypotheses


def ours(pairs: Pairs) -> dict[str, float | None]:
    """Scores of this project."""
    return score_captions(*pairs, pretokenised=True, meteor="none").values


def theirs(pairs: Pairs) -> dict[str, float]:
    """Scores of pycocoevalcap."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = dict(enumerate(pairs[0]))
    found = {case: [text] for case, text in enumerate(pairs[1])}
    bleu = Bleu(4).compute_score(wanted, found, verbose=0)[0]
    scores = {f"bleu_{order + 1}": float(value) for order, value in enumerate(bleu)}
    return scores | {
        "rouge_l": float(Rouge().compute_score(wanted, found)[0]),
        "cider": float(Cider().compute_score(wanted, found)[0]),
    }


def main() -> None:
    """Time both and compare their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1564)
    parser.add_argument(
        "--words", type=int, default=236, help="words of a reference, as CT-RATE's median (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--alone", action="store_true", help="only ours: pycocoevalcap takes minutes on many cases")
    options = parser.parse_args()
    pairs = draw(options.cases, options.words)
    subjects = {"ours": lambda: ours(pairs)} | ({} if options.alone else {"pycocoevalcap": lambda: theirs(pairs)})
    timings = interleave(subjects, options.rounds)
    seconds, cpu = Timing.fastest(timings, "wall"), Timing.fastest(timings, "cpu")
    result: dict[str, object] = {"cases": options.cases, "seconds": seconds, "cpu_seconds": cpu}
    if not options.alone:
        mine, other = ours(pairs), theirs(pairs)
        result["largest_difference"] = max(abs((mine[name] or 0.0) - value) for name, value in other.items())
        result["speedup"] = round(cpu["pycocoevalcap"] / cpu["ours"], 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
