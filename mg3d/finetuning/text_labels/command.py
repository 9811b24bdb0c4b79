"""The command line of the report labeller: train, evaluate, label."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mg3d.command_line import Parser, exit_code_of
from mg3d.datasets.labelled_reports import (
    LabelledReports,
    read_labelled_reports,
    split_report,
    write_labelled_reports,
)
from mg3d.errors import ConfigError, DataError
from mg3d.files import add_encoding_option
from mg3d.finetuning.text_labels.remembered import read_run, recalled, remembered, table_digest
from mg3d.locks import exclusive_output

DEFAULT_ENCODER = "zzxslp/RadBERT-RoBERTa-4m"
_HELP = """Read the 18 CT-RATE findings from reports.

    %(prog)s train --data train.csv --val val.csv --test test.csv --text-encoder FOLDER_OR_HUB_ID
    %(prog)s train --data labelled.csv --fold 0 --num-folds 5      one fold held out
    %(prog)s resume RUN                                            go on where a killed training stopped
    %(prog)s evaluate --model RUN/best --data test.csv --out DIR
    %(prog)s label --model RUN/best --data new_reports.csv --out inferred.csv

A small encoder on a CPU, in a minute or two: --unit sentence --pooling mean --max-length 64 --batch-size 16
--probe-epochs 20 --max-epochs 0 (the linear layer alone, on text vectors encoded once).

Tables are csv files with the columns AccessionNo,report_text and, except for label, one 0/1 column per finding. train
writes a run folder with best/, last/, metrics.json, per_case.csv and the published tables, and prints F1 per finding
beside a keyword labeller and two constants. The last line of standard output is one JSON object. Exit code 0: fine;
1: the run broke down; 2: bad input or arguments.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,resume,evaluate,label}")
    _add_training(commands.add_parser("train", help="train, then score on held-out reports"))
    again = commands.add_parser("resume", help="go on with a training that was killed, with its own options")
    again.add_argument("run", type=Path, metavar="RUN", help="folder that train has written")
    for name, meaning in (("evaluate", "score a trained classifier"), ("label", "label new reports")):
        add = commands.add_parser(name, help=meaning).add_argument
        add("--model", type=Path, required=True, metavar="RUN/best", help="folder of a trained classifier")
        add("--data", type=Path, required=True, metavar="CSV", help="table of reports")
        add_encoding_option(add)
        add("--out", type=Path, required=True, metavar="PATH", help="folder (evaluate) or csv table (label) to write")
        add("--batch-size", type=int, default=32, metavar="N", help="reports a step (%(default)s)")
        add("--bootstrap-rounds", type=int, default=1000, metavar="N", help="rounds of the intervals (%(default)s)")
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="CSV", help="training table, or the table to split into folds")
    add("--val", type=Path, metavar="CSV", help="table that decides when to stop")
    add("--test", type=Path, metavar="CSV", help="table to score on (else the validation table, and said so)")
    add_encoding_option(add)
    add("--fold", type=int, metavar="K", help="hold out this part of --data instead of reading --val and --test")
    add("--num-folds", type=int, default=5, metavar="N", help="parts (%(default)s)")
    add("--val-share", type=float, default=0.1, metavar="P", help="share of the rest that stops training (%(default)s)")
    add("--text-encoder", default=DEFAULT_ENCODER, metavar="DIR_OR_ID", help="encoder to start from (%(default)s)")
    add("--unit", choices=("report", "sentence"), default="report", help="what is read at once (%(default)s)")
    add("--pooling", choices=("pooler", "cls", "mean"), default="pooler", help="text vector (%(default)s)")
    add("--max-length", type=int, default=512, metavar="T", help="tokens of a report or sentence (%(default)s)")
    add("--dropout", type=float, default=0.1, metavar="P", help="of encoder and head (%(default)s)")
    add("--learning-rate", type=float, default=2e-5, metavar="R", help="of AdamW (%(default)s)")
    add("--weight-decay", type=float, default=0.01, metavar="W", help="not of biases and norms (%(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="reports a step (%(default)s)")
    add("--max-epochs", type=int, default=100, metavar="N", help="(%(default)s; published 1000)")
    add("--patience", type=int, default=10, metavar="N", help="epochs without progress (%(default)s; published 100)")
    add("--schedule", choices=("none", "plateau", "cosine"), default="none", help="learning rate (%(default)s)")
    add("--shuffle-share", type=float, default=0.0, metavar="P", help="reports with shuffled sentences (%(default)s)")
    add("--positive-weight", action="store_true", help="weigh findings by absent / present")
    add("--probe-epochs", type=int, default=0, metavar="N", help="first epochs of the linear layer alone (%(default)s)")
    add("--probe-rate", type=float, default=3e-2, metavar="R", help="learning rate of these (%(default)s)")
    add("--freeze-layers", type=int, default=0, metavar="N", help="lower layers kept as they are (%(default)s)")
    add("--precision", choices=("32", "bf16"), default="32", help="of training (%(default)s)")
    add("--max-minutes", type=float, default=0.0, metavar="M", help="start no epoch after this time (0: no limit)")
    add("--seed", type=int, default=0, metavar="S", help="of weights, order and folds (%(default)s)")
    add("--bootstrap-rounds", type=int, default=1000, metavar="N", help="rounds of the intervals (%(default)s)")
    add("--log-dir", type=Path, default=Path("result"), metavar="DIR", help="where run folders go (%(default)s)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("mg3d.finetuning").setLevel(logging.INFO)
    return exit_code_of(
        lambda: _run(options),
        disk_code=1,
        disk_remedy="check space and permissions, then run the same again",
        interrupted="interrupted",
    )


def _run(options: argparse.Namespace) -> int:
    for name in ("bootstrap_rounds", "batch_size"):
        if getattr(options, name, 1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}", "give at least 1")
    run = {"train": _train, "resume": _resume, "evaluate": _evaluate, "label": _label}[options.command]
    text, summary = run(options)
    sys.stdout.write(f"{text}\n{json.dumps(summary)}\n" if text else f"{json.dumps(summary)}\n")
    return 0


def _train(options: argparse.Namespace, resumed: Path | None = None) -> tuple[str, dict[str, Any]]:
    train, val, test, notes = _tables(options)
    parts = {"train": train.ids, "val": val.ids, "test": test.ids}
    digest = table_digest(train, val, test)
    if resumed is not None and read_run(resumed, "splits.json").get("digest") != digest:
        raise DataError("the tables have changed since the training began", "give them back, or train anew")
    import torch

    from mg3d.finetuning.text_labels.state import STATE
    from mg3d.finetuning.text_labels.training import BEST, TrainingOptions, fit
    from mg3d.models.finetune.text_classifier import ClassifierOptions, ReportLabeller
    from mg3d.training.run_folder import create_run_folder, run_lock, write_json

    training = TrainingOptions(**{field.name: getattr(options, field.name) for field in fields(TrainingOptions)})
    design = ClassifierOptions(train.names, options.unit, options.pooling, options.max_length, options.dropout)
    torch.manual_seed(options.seed)
    labeller = ReportLabeller.create(options.text_encoder, design, split_report)
    if resumed is None:
        folder = create_run_folder(options.log_dir, "text_classifier", options.seed)
        write_json(folder / "splits.json", {**parts, "digest": digest, "notes": notes})
        given = remembered(options)
        write_json(folder / "config.json", {**given, "classifier": asdict(design), "training": asdict(training)})
    else:
        folder = resumed
    with run_lock(folder):
        history = fit(labeller, train, val, training, folder, resume=resumed is not None)
        text, summary = _scored(labeller, test, train, folder, options, notes)
        for path in folder.glob(f"{STATE}*"):  # the run is complete
            path.unlink()
    sizes = {name: len(ids) for name, ids in parts.items()}
    return text, {"run_dir": str(folder), "model": str(folder / BEST), "epochs": len(history), **sizes, **summary}


def _resume(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    stored = read_run(options.run, "config.json")
    if (options.run / "metrics.json").exists():
        raise ConfigError(f"{options.run} is a finished training", f"evaluate --model {options.run / 'best'}")
    return _train(recalled(stored), options.run)


def _evaluate(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    labeller = _load(options.model)
    test = read_labelled_reports(options.data, labeller.options.findings, encoding=options.encoding)
    with exclusive_output(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        text, summary = _scored(labeller, test, None, options.out, options, [])
    return text, {"out": str(options.out), "test": len(test), **summary}


def _label(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if options.out.suffix != ".csv" or not options.out.absolute().parent.is_dir():
        raise DataError("labels are written to a csv file in a folder that exists", "mend --out", path=str(options.out))
    with exclusive_output(options.out):
        reports = read_labelled_reports(options.data, (), need_labels=False, encoding=options.encoding)
        labeller = _load(options.model)
        found = labeller.label(reports.texts, batch_size=options.batch_size)
        labelled = LabelledReports(reports.ids, reports.texts, found, labeller.options.findings)
        write_labelled_reports(options.out, labelled)
    empty = sum(not text.strip() for text in reports.texts)
    counts = dict(zip(labelled.names, map(int, found.sum(axis=0)), strict=True))
    return "", {"out": str(options.out), "reports": len(reports), "empty_reports": empty, "present": counts}


def _load(folder: Path) -> Any:
    from mg3d.models.finetune.text_classifier import ReportLabeller

    return ReportLabeller.load(folder, split_report)


def _tables(
    options: argparse.Namespace,
) -> tuple[LabelledReports, LabelledReports, LabelledReports, list[str]]:
    """Training, validation and test reports, and what to say about them."""
    from mg3d.finetuning.text_labels.splits import held_out_fold

    data = read_labelled_reports(options.data, encoding=options.encoding)
    if options.fold is not None:
        if options.val or options.test:
            raise ConfigError("--fold beside --val or --test", "give either a fold or the tables")
        parts = held_out_fold(data, options.fold, options.num_folds, options.val_share, options.seed)
        return (*parts, [f"fold {options.fold} of {options.num_folds}, identical reports kept together"])
    if options.val is None:
        raise ConfigError("neither --fold nor --val is given", "add --fold 0, or --val and --test tables")
    val = read_labelled_reports(options.val, encoding=options.encoding)
    test = read_labelled_reports(options.test, encoding=options.encoding) if options.test else val
    notes = [] if options.test else ["selection = reporting: scored on the reports that stopped the training"]
    known = {" ".join(text.lower().split()) for text in data.texts}
    shared = sum(" ".join(text.lower().split()) in known for text in test.texts)
    return data, val, test, notes + ([f"{shared} test reports are training reports too"] if shared else [])


def _scored(
    labeller: Any,
    test: LabelledReports,
    train: LabelledReports | None,
    folder: Path,
    options: argparse.Namespace,
    notes: list[str],
) -> tuple[str, dict[str, Any]]:
    from mg3d.finetuning.text_labels.scores import render, score_labels, write_files
    from mg3d.training.run_folder import write_json

    probabilities = labeller.probabilities(test.texts, options.batch_size)
    scores = score_labels(probabilities, test, train, rounds=options.bootstrap_rounds)
    scores["notes"] = [*notes, *scores["notes"]]
    write_json(folder / "metrics.json", scores)
    write_files(folder, probabilities, test)
    macro = {name: entries["ce_f1_macro"]["mean"] for name, entries in scores["labellers"].items()}
    return render(scores), {"f1_macro": macro, "f1_macro_ci95": scores["metrics"]["ce_f1_macro"]["ci95"]}
