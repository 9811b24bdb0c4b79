"""Installed packages below the floors of ``requirements.txt``, some of which close published security holes."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

log = logging.getLogger(__name__)

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


def requirements() -> list[Requirement]:
    """Core requirements: of the checkout, or of the installed package."""
    lines = importlib.metadata.requires("mg3d") or [] if not REQUIREMENTS.is_file() else _lines(REQUIREMENTS)
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [line for line in (raw.split("#")[0].strip() for raw in text.splitlines()) if line]


def floor_of(requirement: Requirement) -> Version | None:
    """Least version that a requirement allows; None if any is allowed."""
    floors = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    return max(floors, default=None)


def below_floors() -> list[tuple[str, str, str]]:
    """Installed packages below their floor: name, installed version, floor."""
    found = []
    for requirement in requirements():
        floor = floor_of(requirement)
        try:
            installed = importlib.metadata.version(requirement.name)
            below = floor is not None and Version(installed) < floor
        except (importlib.metadata.PackageNotFoundError, InvalidVersion):
            continue
        if below:
            found.append((requirement.name, installed, str(floor)))
    return found


@functools.cache
def warn_below_floors() -> None:
    """Say once in a process, in one line, which packages are below their floors."""
    try:
        found = below_floors()
    except (OSError, importlib.metadata.PackageNotFoundError):
        return
    if found:
        listed = ", ".join(f"{name} {installed} (needs {floor})" for name, installed, floor in found)
        log.warning("below the floors of requirements.txt, security fixes may be missing: %s", listed)
