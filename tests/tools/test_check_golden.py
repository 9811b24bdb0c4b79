"""The parity tool on a second directory: other widths, batches, grids, seeds and names than the recorded one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recipes_data
import recipes_encoders
import recipes_modules
import recipes_step
import torch
from recording import Recording, add_tensor, edit_index, rehash, spoil, write_directory

from tools.check_golden import main
from tools.golden.adapters import FAMILIES
from tools.golden.index import Entry, json_leaves, load_directory
from tools.golden.runner import Outcome, check_directory

RECIPES = (recipes_modules, recipes_encoders, recipes_data, recipes_step)
SLOW_FAMILIES = {"itc_gather_two_ranks", "pretraining_step", "swin", "unet3d_genesis", "unet3d_pcrlv2"}


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    """Every recorded entry of the second directory."""
    return [each for module in RECIPES for each in module.recordings()]


@pytest.fixture(scope="module")
def outcomes(recordings: list[Recording], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What the tool says about the second directory."""
    folder = tmp_path_factory.mktemp("second")
    write_directory(folder, recordings)
    return {outcome.name: outcome for outcome in check_directory(folder)}


@pytest.fixture(scope="module")
def spoiled(
    recordings: list[Recording], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[str, Outcome]]]:
    """Family -> (name of the wrong value, outcome of its entry), one wrong value in every entry that holds results."""
    folder = tmp_path_factory.mktemp("spoiled")
    wrong = [each.spoilable()[0] if each.spoilable() else "" for each in recordings]
    write_directory(folder, [spoil(each, name) if name else each for each, name in zip(recordings, wrong, strict=True)])
    found: dict[str, list[tuple[str, Outcome]]] = {family: [] for family in FAMILIES}
    for each, name, outcome in zip(recordings, wrong, check_directory(folder), strict=True):
        if name:
            found[each.family].append((name, outcome))
        else:
            assert outcome.passed, outcome.line()  # weights and inputs beside a wrong result stay right
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads, which the command sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(recordings: list[Recording], tmp_path: Path) -> Path:
    """A quick directory: one module, one JSON entry, and weights with their partners."""
    names = ("first", "rates", "wide weights", "wide run")
    write_directory(tmp_path / "small", [each for each in recordings if each.name in names])
    return tmp_path / "small"


def file_of(folder: Path, entry: str) -> Path:
    """First file of an entry."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return folder / next(raw["files"][0] for raw in index["entries"] if raw["name"] == entry)


def change_entry(folder: Path, name: str, **values: Any) -> None:
    """Set keys of one entry of the index."""
    edit_index(folder, lambda index: next(raw for raw in index["entries"] if raw["name"] == name).update(values))


def run(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and everything printed."""
    status = main([str(folder), *arguments])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return status, printed.out + printed.err


def test_every_family_is_recorded(recordings: list[Recording]) -> None:
    assert {each.family for each in recordings} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_directory_passes(family: str, recordings: list[Recording], outcomes: dict[str, Outcome]) -> None:
    for each in recordings:
        outcome = outcomes[each.name]
        if each.family == family:
            assert outcome.passed and not outcome.uncompared, outcome.line()
            assert outcome.compared >= len(each.result_names()), outcome.line()


def test_second_directory_shares_no_entry_and_no_config_with_the_recorded_one(
    recordings: list[Recording], golden_dir: Path
) -> None:
    stored = {
        raw["name"]: raw["config"]
        for raw in json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))["entries"]
    }
    assert not stored.keys() & {each.name for each in recordings}
    assert not [each.name for each in recordings if each.config and each.config in stored.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_wrong_value_fails(family: str, spoiled: dict[str, list[tuple[str, Outcome]]]) -> None:
    assert spoiled[family]
    for name, outcome in spoiled[family]:
        assert not outcome.passed and not outcome.uncompared, f"{name}: {outcome.line()}"
        assert name in outcome.problem, outcome.line()


def test_any_wrong_value_fails(recordings: list[Recording], tmp_path: Path) -> None:
    """Every stored result of the quick families, one after the other."""
    quick = [each for each in recordings if each.family not in SLOW_FAMILIES and not each.uses]
    for position in range(max(len(each.spoilable()) for each in quick)):
        chosen = [each for each in quick if position < len(each.spoilable())]
        names = [each.spoilable()[position] for each in chosen]
        folder = tmp_path / str(position)
        write_directory(folder, [spoil(each, name) for each, name in zip(chosen, names, strict=True)])
        for name, outcome in zip(names, check_directory(folder), strict=True):
            assert not outcome.passed and name in outcome.problem, f"{name}: {outcome.line()}"
        shutil.rmtree(folder)


def test_two_threads_pass(
    recordings: list[Recording], tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    elsewhere = ("itc_gather_two_ranks", "pretraining_step")  # one thread each; covered by the recorded directory
    chosen = [each for each in recordings if each.family not in elsewhere]
    write_directory(tmp_path / "second", chosen)
    status, printed = run(tmp_path / "second", capsys, "--threads", "2")
    assert status == 0, printed
    assert json.loads(printed.splitlines()[-1])["passed"] == len(chosen)


def test_report_has_one_line_per_entry(small: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    status, printed = run(small, capsys)
    *lines, total, summary = printed.splitlines()
    assert status == 0 and len(lines) == 4 and total == "4 of 4 entries pass"
    assert all(" PASS " in line and "not compared   0" in line and "worst error/allowed" in line for line in lines)
    assert json.loads(summary)["entries"] == 4


def wrong_digest(folder: Path) -> None:
    """Change one byte of a file."""
    path = file_of(folder, "first")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")


def wrong_shape(folder: Path) -> None:
    """An output twice as long; a module that gives one row more must not be sampled silently."""
    add_tensor(folder, file_of(folder, "first").name, "out.pooled", torch.zeros(1, 14))
    change_entry(folder, "first", tensors=None)
    rehash(folder, "first")


def extra_tensor(folder: Path, name: str = "in.more") -> None:
    """A tensor no adapter knows, in file and index."""
    add_tensor(folder, file_of(folder, "first").name, name, torch.zeros(3))
    change_entry(folder, "first", tensors=None)
    rehash(folder, "first")


def extra_json(folder: Path) -> None:
    """A JSON value no adapter knows."""
    path = file_of(folder, "rates")
    body = json.loads(path.read_text(encoding="utf-8"))
    body[0]["comment"] = {"more": 1.0}
    path.write_text(json.dumps(body))
    rehash(folder, "rates")


def stored_nan(folder: Path) -> None:
    """A stored value that is not a number."""
    add_tensor(folder, file_of(folder, "first").name, "out.pooled", torch.full((2, 14), torch.nan))
    rehash(folder, "first")


def without_partner(folder: Path) -> None:
    """Weights whose run is gone."""

    def drop(index: dict[str, Any]) -> None:
        index["entries"] = [raw for raw in index["entries"] if raw["name"] != "wide run"]

    edit_index(folder, drop)


def no_consumer(folder: Path) -> None:
    """Weights that no entry uses."""
    without_partner(folder)
    change_entry(folder, "wide weights", uses=[])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "sha256": (wrong_digest, "first", "another sha256"),
    "missing file": (lambda folder: file_of(folder, "first").unlink(), "first", "is missing"),
    "outside": (lambda folder: change_entry(folder, "first", files=["../index.json"]), "first", "is missing"),
    "no digest": (lambda folder: change_entry(folder, "first", sha256=[]), "first", "0 sha256"),
    "no files": (lambda folder: change_entry(folder, "first", files=None), "first", "first"),
    "family": (lambda folder: change_entry(folder, "first", family="new"), "first", "unknown family 'new'"),
    "partner": (without_partner, "wide weights", "partner wide run is not in the index"),
    "consumer": (no_consumer, "wide weights", "no partner entry consumes it"),
    "unread tensor": (extra_tensor, "first", "never read: in.more"),
    "unread result": (lambda folder: extra_tensor(folder, "out.more"), "first", "never read: out.more"),
    "unlisted": (lambda folder: change_entry(folder, "first", tensors={}), "first", "not those index.json lists"),
    "unread JSON": (extra_json, "rates", "never read: 0/comment/more"),
    "shape": (wrong_shape, "first", "differs: out.pooled"),
    "nan": (stored_nan, "first", "differs: out.pooled"),
    "grad_rule": (lambda folder: change_entry(folder, "first", grad_rule="close"), "first", "grad_rule not understood"),
    "settings": (lambda folder: change_entry(folder, "wide run", config={}), "wide run", "KeyError"),
    "not tensors": (
        lambda folder: (file_of(folder, "first").write_bytes(b"{}"), rehash(folder, "first")),
        "first",
        "header",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_fails_with_a_clear_line(
    kind: str, small: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    damage, entry, message = DAMAGE[kind]
    if kind == "settings":  # the weights hold the same settings, so both have to lose them
        change_entry(small, "wide weights", config={})
    damage(small)
    status, printed = run(small, capsys)
    line = next(line for line in printed.splitlines() if line.startswith(f"{entry} "))
    assert status == 1 and " FAIL " in line and message in line, printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(entries=[]), "lists no entries"),
        (lambda index: index.pop("entries"), "lists no entries"),
        (lambda index: index["entries"].append(index["entries"][0]), "names an entry twice"),
        (lambda index: index["entries"][0].pop("name"), "without a name"),
        (lambda index: index.pop("tolerance_default"), "no tolerance"),
    ],
)
def test_unusable_index_is_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    small: Path,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    edit_index(small, change)
    status, printed = run(small, capsys)
    assert status == 2 and message in printed and len(printed.splitlines()) == 1


def test_missing_or_broken_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    assert run(tmp_path, capsys)[0] == 2
    (tmp_path / "index.json").write_text("{")
    assert run(tmp_path, capsys)[0] == 2


def test_failed_json_entry_counts_what_it_did_not_compare(small: Path) -> None:
    body = json.loads(file_of(small, "rates").read_text(encoding="utf-8"))
    change_entry(small, "rates", family="new")
    outcome = next(outcome for outcome in check_directory(small) if outcome.name == "rates")
    assert outcome.uncompared == [path for path, _ in json_leaves(body)]


def test_integers_are_exact_and_floats_are_not_rounded(tmp_path: Path) -> None:
    """Integers off by a little, or floats in their place, never pass; bools are not numbers."""
    from tools.golden.bundle import Bundle

    write_directory(
        tmp_path,
        [
            Recording("tensors", "pooler", {"out.x": torch.tensor([1, 2]), "out.y": torch.tensor([1, 0])}),
            Recording("json", "pooler", body={"a": 3, "b": True, "c": [1.0, 2.0], "d": [4, 5], "e": 1}),
        ],
    )
    entries, _ = load_directory(tmp_path)
    bundle = Bundle(entries)
    bundle.check("out.x", torch.tensor([1.4, 2.0]))
    bundle.check("out.y", torch.tensor([257, 256]))
    values = {"a": 3.0001, "b": 1, "c": [1.0, float("nan")], "d": [4, 6], "e": True}
    for path, value in values.items():
        bundle.check_json(entries[1], path, value)
    ratios = bundle.tallies["tensors"].compared | bundle.tallies["json"].compared
    assert set(ratios) == {"out.x", "out.y", *values} and min(ratios.values()) == float("inf")
    bundle.check_json(entries[1], "c", [1.00001, 2.0])
    assert 0 < bundle.tallies["json"].compared["c"] < 1


def test_help_needs_no_torch(repository: Path) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['check_golden.py', '--help']\n"
        "try:\n    runpy.run_path('tools/check_golden.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'monai', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "2"])
def test_recorded_directory_passes(count: str, repository: Path, golden_dir: Path) -> None:
    place = [str(golden_dir)] if count == "2" else []  # the same one by default
    command = [sys.executable, "tools/check_golden.py", *place, "--threads", count]
    patient = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads must not spin where cores are shared
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", timeout=1500, env=patient)
    assert done.returncode == 0, done.stdout + done.stderr
    total = len(json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))["entries"])
    *lines, words, summary = done.stdout.splitlines()
    assert len(lines) == total and words == f"{total} of {total} entries pass"
    numbers = json.loads(summary)
    assert numbers["entries"] == numbers["passed"] == total and numbers["compared"] > total
    assert all("not compared   0" in line for line in lines)


@pytest.mark.slow
def test_one_wrong_value_in_the_recorded_directory_fails(golden_dir: Path, tmp_path: Path) -> None:
    """Every family that the recorded directory has, each with one stored result 1 % off."""
    entries, broken = load_directory(golden_dir)
    assert not broken
    raws = json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))
    recorded = [_as_recording(entry) for entry in entries]
    wrong = [each.spoilable()[-1] if each.spoilable() else "" for each in recorded]
    write_directory(
        tmp_path / "wrong",
        [spoil(each, name) if name else each for each, name in zip(recorded, wrong, strict=True)],
        grad_rule=raws["grad_rule"],
    )
    for name, outcome in zip(wrong, check_directory(tmp_path / "wrong"), strict=True):
        assert outcome.passed is not bool(name), f"{name}: {outcome.line()}"


JSON_RESULTS = ("cml", "output", "input_ids", "mask_labels", "masked_cells", "factor")


def _as_recording(entry: Entry) -> Recording:
    """An entry that was read, ready to be written again with its own settings."""
    results = None
    if entry.body is not None:
        results = [path for path, _ in json_leaves(entry.body) if path.split("/")[-1] in JSON_RESULTS]
    elif not [name for name in entry.tensors if name.split(".")[0] not in ("in", "cot", "state")]:
        results = []
    keys = ("name", "family", "tensors", "body", "role", "uses", "config", "options", "tolerance")
    made = Recording(**{key: getattr(entry, key) for key in keys}, results=results)
    made.results = [name for name in made.result_names() if not name.endswith("_u8")]  # 8-bit images are inputs
    return made
