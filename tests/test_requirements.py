"""Dependencies: every one has a floor, an upper bound and a reason; floors are what the security notes say."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mg3d import floors

NOTE = re.compile(r"^#   (?P<name>\S+) (?P<floor>[\d.]+): (?P<holes>.+)$")
HOLE = re.compile(r"CVE-\d{4}-\d{4,}|GHSA(-[a-z0-9]{4}){3}")


def lines(path: Path) -> list[tuple[Requirement, str]]:
    """Requirements of a file, each with the reason beside it or in the comment above it."""
    found, above = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        words, _, reason = (part.strip() for part in line.partition("#"))
        if words:
            found.append((Requirement(words), reason or above))
        above = reason if not words else above
    return found


def notes(repository: Path) -> dict[str, re.Match[str]]:
    text = (repository / "requirements.txt").read_text(encoding="utf-8")
    return {found["name"]: found for found in map(NOTE.match, text.splitlines()) if found}


def optional(repository: Path) -> list[tuple[str, str]]:
    """Requirement and comment of every optional dependency of ``pyproject.toml``, and of its build."""
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    listed = [*content["build-system"]["requires"]]
    listed += [word for words in content["project"]["optional-dependencies"].values() for word in words]
    comments = {word: next(line for line in text.splitlines() if f'"{word}"' in line) for word in listed}
    return [(word, comments[word].partition("#")[2].strip()) for word in listed]


def test_every_requirement_has_a_floor_an_upper_bound_and_a_reason(repository: Path) -> None:
    entries = [entry for path in sorted(repository.glob("requirements*.txt")) for entry in lines(path)]
    entries += [(Requirement(words), reason) for words, reason in optional(repository)]
    assert len(entries) > 30
    for requirement, reason in entries:
        kinds = {part.operator for part in requirement.specifier}
        assert kinds in ({"=="}, {">=", "<"}), requirement
        assert len(reason) > 3, f"{requirement} has no reason"


def test_floors_are_what_the_security_notes_say(repository: Path) -> None:
    stated = notes(repository)
    wanted = {"torch": "2.10", "transformers": "5.5", "monai": "1.6", "jinja2": "3.1.6", "setuptools": "80.10.2"}
    assert {name: stated[name]["floor"] for name in wanted} == wanted
    held = {requirement.name: requirement for requirement, _ in lines(repository / "requirements.txt")}
    assert "pytorch-lightning" in stated and set(stated) <= set(held)
    for name, note in stated.items():
        assert floors.floor_of(held[name]) == Version(note["floor"]), name
        assert HOLE.search(note["holes"]), name


def test_a_package_named_twice_has_the_same_bounds(repository: Path) -> None:
    found = [requirement for path in repository.glob("requirements*.txt") for requirement, _ in lines(path)]
    found += [Requirement(words) for words, _ in optional(repository)]
    bounds: dict[str, set[str]] = {}
    for requirement in found:
        bounds.setdefault(requirement.name.lower(), set()).add(str(requirement.specifier))
    assert {name: each for name, each in bounds.items() if len(each) > 1} == {}


def test_what_is_installed_here_is_not_below_its_floor(repository: Path) -> None:
    assert floors.below_floors() == []
    core = [requirement.name for requirement, _ in lines(repository / "requirements.txt")]
    assert [requirement.name for requirement in floors.requirements()] == core


def test_a_version_below_its_floor_is_warned_of_once_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = importlib.metadata.version
    old = {"torch": "2.6.0+cpu", "transformers": "5.4.2"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or real(name))
    assert floors.below_floors() == [("torch", "2.6.0+cpu", "2.10"), ("transformers", "5.4.2", "5.5")]
    floors.warn_below_floors.cache_clear()
    with caplog.at_level(logging.WARNING):
        floors.warn_below_floors()
        floors.warn_below_floors()
    floors.warn_below_floors.cache_clear()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "\n" not in told[0]
    assert "torch 2.6.0+cpu (needs 2.10), transformers 5.4.2 (needs 5.5)" in told[0]


def test_a_run_and_the_loading_of_weights_warn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from mg3d.models.weights_file import read_weights_file
    from mg3d.training import provenance

    torch.save({"x": torch.ones(2)}, tmp_path / "w.pt")
    monkeypatch.setattr(floors, "below_floors", lambda: [("torch", "2.6.0", "2.10")])
    for enter in (lambda: read_weights_file(tmp_path / "w.pt"), lambda: provenance.describe(tmp_path, (), 1)):
        floors.warn_below_floors.cache_clear()
        caplog.clear()
        enter()
        assert "torch 2.6.0 (needs 2.10)" in caplog.text
    floors.warn_below_floors.cache_clear()


def test_an_installed_package_knows_its_floors_without_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(floors, "REQUIREMENTS", tmp_path / "absent.txt")
    stated = ["torch<2.15,>=2.10", 'dask>=2026.1; extra == "dask"', "not a requirement!"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: stated)
    assert [requirement.name for requirement in floors.requirements()] == ["torch"]
