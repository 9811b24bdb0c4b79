"""Pictures of a run: overlays of label maps, curves, matrices, and the HTML page that holds them all.

Importing this draws nothing and needs no matplotlib; the functions import it when they are called.
"""

from mg3d.finetuning.pictures.curves import confusion_png, curves_png, froc_png, roc_pr_png
from mg3d.finetuning.pictures.overlay import best_median_worst, overlay_png
from mg3d.finetuning.pictures.report import write_report
from mg3d.finetuning.pictures.run_figures import draw_run_figures

__all__ = [
    "best_median_worst",
    "confusion_png",
    "curves_png",
    "draw_run_figures",
    "froc_png",
    "overlay_png",
    "roc_pr_png",
    "write_report",
]
