"""What each part of the pre-training adds, on phantom studies: ``python benchmarks/learning_study.py --out DIR``.

Every variant is one two-process run of the named config `demo` with a few words changed, over several seeds. Finished
runs are kept, so a stopped study goes on where it was. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

REPOSITORY = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, tuple[str, ...]] = {
    "all objectives": (),
    "published three": ("loss_names.itc=0",),
    "without sen_mlm": ("loss_names.sen_mlm=0",),
    "without swin_unetr_mim": ("loss_names.swin_unetr_mim=0",),
    "without local_itc": ("loss_names.local_itc=0",),
    "legacy merging": ("patch_merging=legacy",),
}
FIGURES = {
    "probe": ("linear_probe_auroc_trained", "mean"),
    "gain": ("linear_probe_gain", "mean"),
    "zero-shot": ("zero_shot_auroc", "mean"),
    "r2v R@1 / chance": ("report_to_volume_recall_at_1", "times_chance"),
    "r2v R@10 / chance": ("report_to_volume_recall_at_10", "times_chance"),
    "v2r R@1 / chance": ("volume_to_report_recall_at_1", "times_chance"),
    "v2r R@10 / chance": ("volume_to_report_recall_at_10", "times_chance"),
    "effective rank": ("effective_rank_image_embeddings", "mean"),
}


def read_figures(metrics: Path) -> dict[str, float]:
    """The compared figures of one run; a figure the run does not have is left out."""
    entries = json.loads(metrics.read_text(encoding="utf-8"))
    return {name: entries[key][part] for name, (key, part) in FIGURES.items() if entries.get(key)}


def run_variant(name: str, seed: int, out: Path, words: Sequence[str]) -> dict[str, float]:
    """Train one variant, or read it when it is finished.

    Args:
        name: key of ``VARIANTS``.
        seed: seed of the run.
        out: folder of the study.
        words: further words for every run, for example where the data are.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    folder = out / name.replace(" ", "_") / f"seed{seed}"
    finished = sorted(folder.glob("*/version_*/metrics.json"))
    if not finished:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py"]
        named = ["with", "task_pretrain_mg3d", "demo", "per_gpu_batchsize=8"]
        command = [*launcher, *named, f"seed={seed}", f"log_dir={folder}"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run([*command, *words, *VARIANTS[name]], cwd=REPOSITORY, stdout=log, stderr=log, check=True)
        finished = sorted(folder.glob("*/version_*/metrics.json"))
    return read_figures(finished[-1])


def render(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown table: mean over the seeds, with the smallest and largest value when there are several."""
    lines = ["| variant (seeds) | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, by_seed in results.items():
        cells = []
        for figure in FIGURES:
            values = [found[figure] for found in by_seed.values() if figure in found]
            spread = f" ({min(values):.3f}..{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}" if values else "-")
        lines.append(f"| {name} ({len(by_seed)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the study.

    Args:
        arguments: command line without the program name.

    Returns:
        0; a run that fails ends the study with its own error.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; finished runs in it are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("words", nargs="*", help="after --, further KEY=VALUE words for every run")
    options = parser.parse_args(arguments)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name in options.variants:
        for seed in options.seeds:
            found = run_variant(name, seed, options.out.resolve(), options.words)
            results.setdefault(name, {})[seed] = found
            print(
                f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True
            )
    print(render(results))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
