"""The data-set page: tiles, checks with examples, and the charts of every corpus."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tools.gallery import charts
from tools.gallery.facts import Facts
from tools.gallery.items import MAX_LISTED_IDS
from tools.gallery.pages import Card
from tools.gallery.statistics import (
    TOKEN_LIMIT,
    CorpusStatistics,
    DatasetStatistics,
    Duplicates,
    bin_values,
    edges,
    median,
    share_above,
)

_SIGNS: Final = {"ok": "✓", "look": "!", "wrong": "✗"}
_AXES: Final = ("z", "y", "x")


def index_values(
    statistics: DatasetStatistics, facts: Mapping[str, Facts], cards: Sequence[Card], kind: str, raw: bool
) -> dict[str, Any]:
    """Return everything the index template shows besides the cards.

    Args:
        statistics: counts over all rows.
        facts: what the manifests say, per corpus.
        cards: the drawn studies.
        kind: what was read, in words.
        raw: whether grids are known of the drawn studies only.
    """
    corpora = [
        _corpus_values(name, part, facts.get(name, Facts()), statistics.counter.exact, raw)
        for name, part in sorted(statistics.corpora.items(), key=lambda item: -item[1].studies)
    ]
    patients = sum(part.patients for part in statistics.corpora.values())
    bad = sum(bool(card.reason) for card in cards)
    tiles = [
        (charts.number(statistics.studies), "studies"),
        (charts.number(patients), "patients"),
        (charts.number(len(corpora)), "corpus" if len(corpora) == 1 else "corpora"),
        (charts.number(len(cards)), "drawn here"),
    ]
    checks = dataset_checks(statistics, facts, cards)
    names = {name for card in cards for name in card.study.label_names}
    return {
        "kind": kind,
        "tiles": tiles,
        "corpora": corpora,
        "checks": [check for check in checks if check["state"] != "ok"],
        "passed": [check["words"] for check in checks if check["state"] == "ok"],
        "splits": list(dict.fromkeys(card.study.split for card in cards)),
        "label_names": sorted(names),
        "drawn_note": f"{len(cards)} of {statistics.studies} drawn" + (f", {bad} not readable" if bad else ""),
    }


def dataset_checks(
    statistics: DatasetStatistics, facts: Mapping[str, Facts], cards: Sequence[Card]
) -> list[dict[str, Any]]:
    """Return the checks in order, each with a state (ok, look, wrong), words and examples."""
    bad = [card for card in cards if card.reason]
    unreadable = [(f"{item.where}: {item.reason}", [], 0) for item in statistics.problems[:20]]
    unreadable += [(card.reason, [card.study.image_id], 0) for card in bad]
    empty = [name for part in statistics.corpora.values() for name in part.empty]
    checks = [
        _check(len(statistics.problems) + len(bad), "wrong", "rows or files that cannot be read", unreadable),
        _check(
            sum(len(item.mismatches) for item in facts.values()),
            "wrong",
            "files whose manifest disagrees",
            [(words, [], 0) for item in facts.values() for words in item.mismatches],
        ),
        _duplicate_check(statistics.same_id(), "wrong", "studies that share their id with another"),
        _check(
            sum(part.shared_patients() for part in statistics.corpora.values()), "wrong", "patients in two splits", []
        ),
        _duplicate_check(statistics.same_volume(), "look", "studies with the same voxels as another"),
        _check(len(empty), "look", "studies without any text", [("", empty[:20], len(empty) - 20)] if empty else []),
    ]
    for section in ("findings", "impression"):
        without = sum(part.without[section] for part in statistics.corpora.values()) - len(empty)
        checks.append(_check(without, "look", f"studies with other text but no {section}", []))
    checks.append(
        _duplicate_check(statistics.same_report(), "look", "studies that share their whole report with another")
    )
    for words, part in (("scans left out before packing", "exclusions"), ("packed scans with warnings", "warnings")):
        tables = [row for item in facts.values() for row in getattr(item, part).table()]
        examples = [(f"{reason} ({count})", names, count - len(names)) for reason, count, names in tables]
        checks.append(_check(sum(row[1] for row in tables), "look", words, examples))
    return checks


def _check(count: int, state: str, words: str, examples: list[tuple[str, list[str], int]]) -> dict[str, Any]:
    state = state if count else "ok"
    shown = f"{words}: {charts.number(count)}" if count else words
    return {"state": state, "sign": _SIGNS[state], "words": shown, "examples": examples}


def _duplicate_check(found: Duplicates, state: str, words: str) -> dict[str, Any]:
    examples = [(f"{size} times", list(ids), size - MAX_LISTED_IDS) for size, ids in found.examples]
    return _check(found.studies, state, words, examples)


def _corpus_values(name: str, part: CorpusStatistics, facts: Facts, exact: bool, raw: bool) -> dict[str, Any]:
    labels = part.labels()
    text = _text_charts(part, exact)
    text_charts, uncharted = [item for item in text if item["svg"]], [item for item in text if not item["svg"]]
    unknown = sum(label.unknown for label in labels)
    settings = [*facts.settings.items(), *((words, f"{count} scans") for words, count in facts.decisions.items())]
    return {
        "name": name,
        "anchor": re.sub(r"[^A-Za-z0-9]+", "-", f"corpus-{name}"),
        "splits": part.splits(),
        "text_charts": text_charts,
        **_split_charts([*uncharted, *_intensity_charts(part), *_grid_charts(part, facts, raw)]),
        "labels": charts.prevalence(labels, f"Labels of {name}") if labels else "",
        "label_note": "; hatched: unknown" if unknown else "",
        "settings": settings,
        "files": facts.files,
    }


def _split_charts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Charts, and what needs no chart because all rows are alike."""
    return {"charts": [item for item in found if item["svg"]], "alike": [item for item in found if not item["svg"]]}


def _text_charts(part: CorpusStatistics, exact: bool) -> list[dict[str, Any]]:
    over = ("" if exact else "≥ ") + f"{share_above(part.tokens, TOKEN_LIMIT):.1%}"
    words = "tokens" if exact else "words and punctuation, a lower bound of the tokens"
    return [
        _chart(
            part.tokens,
            "Report length",
            f"median {charts.number(median(part.tokens))}; {over} over {TOKEN_LIMIT}",
            words,
            marks=[(TOKEN_LIMIT, f"{TOKEN_LIMIT}, cut here")],
        ),
        _chart(part.sentences, "Sentences in a report", f"median {charts.number(median(part.sentences))}", "sentences"),
        _chart(
            part.fragments,
            "Comma fragments in a report",
            f"median {charts.number(median(part.fragments))}",
            "fragments",
        ),
        _chart(part.sentence_words, "Sentence length", "", "words", y_label="sentences"),
    ]


def _grid_charts(part: CorpusStatistics, facts: Facts, raw: bool) -> list[dict[str, Any]]:
    of = "as acquired, drawn studies only" if raw else "as stored"
    found = [*_axis_charts("Voxels along", part.sizes, "voxels", of), *_axis_charts("Spacing", part.spacing, "mm", of)]
    if any(facts.acquired_spacing) and not raw:
        found += _axis_charts("Voxels along", facts.acquired_sizes, "voxels", "as acquired")
        found += _axis_charts("Spacing", facts.acquired_spacing, "mm", "as acquired")
    return found


def _axis_charts(title: str, axes: Sequence[Counter[Any]], unit: str, of: str) -> list[dict[str, Any]]:
    """One chart per axis; axes that are all alike are told in one line instead."""
    if not any(axes):
        return []
    if all(len(axis) == 1 for axis in axes):
        values = " × ".join(charts.number(next(iter(axis))) for axis in axes)
        return [{"title": f"{title} z, y, x".replace("along ", ""), "note": f"{of}: all {values} {unit}", "svg": ""}]
    groups = [("z", axes[0])]
    groups += [("y and x", axes[1])] if axes[1] == axes[2] else [("y", axes[1]), ("x", axes[2])]
    return [_chart(axis, f"{title} {name}", of, unit) for name, axis in groups]


def _intensity_charts(part: CorpusStatistics) -> list[dict[str, Any]]:
    if not part.volumes:
        return []
    unit = part.volumes[0].unit
    low, high = min(item.low for item in part.volumes), max(item.high for item in part.volumes)
    words = f"{charts.number(low)} to {charts.number(high)}"
    x_label = "HU" if unit == "HU" else "grey level"
    svg = charts.histogram(
        edges(unit), part.intensities(), title="Intensities", x_label=x_label, y_label="% of voxels", cap=True
    )
    return [{"title": "Intensities", "note": f"of the {len(part.volumes)} drawn studies: {words}", "svg": svg}]


def _chart(
    seen: Counter[Any],
    title: str,
    note: str,
    x_label: str,
    *,
    y_label: str = "studies",
    marks: Sequence[tuple[float, str]] = (),
) -> dict[str, Any]:
    if len(seen) < 2:
        words = f"all {charts.number(next(iter(seen)))}" if seen else "none"
        return {"title": title, "note": f"{note}: {words} {x_label}".lstrip(": "), "svg": ""}
    binned = bin_values(seen)
    svg = charts.histogram(
        binned.edges,
        binned.counts,
        title=title,
        x_label=x_label,
        y_label=y_label,
        marks=marks,
        whole=binned.whole,
    )
    return {"title": title, "note": note, "svg": svg}
