"""What lies below a folder: regular files only, every real folder once, and a count of what was passed over.

Pipes, sockets and devices are never opened: reading one can wait for ever. A link to a file is read like the file. A
link to a folder is followed where it leads to a place inside the searched root; one that leads elsewhere is passed over
and counted, unless the caller follows all links.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mg3d.atomic import is_special
from mg3d.errors import DataError

FOLLOW_LINKS = "--follow-links"


@dataclass
class PassedOver:
    """What a search left out.

    Attributes:
        option: of the command, to follow all links; "" without one.
        links: links to folders outside the root.
        special: pipes, sockets and devices.
        unreadable: folders that may not be listed.
    """

    option: str = ""
    links: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """What was left out, in numbers; nothing for what did not occur."""
        found = {"links": self.links, "special_files": self.special, "unreadable_folders": self.unreadable}
        return {f"{name}_left_out": len(paths) for name, paths in found.items() if paths}

    def reasons(self) -> Iterator[tuple[Path, str]]:
        """Every place left out, and why."""
        yield from ((path, f"link to a folder outside the root{self._advice}") for path in self.links)
        yield from ((path, "no regular file: a pipe, socket or device") for path in self.special)
        yield from ((path, "folder that may not be listed") for path in self.unreadable)

    @property
    def _advice(self) -> str:
        return f" ({self.option} searches it)" if self.option else ""

    def lines(self) -> list[str]:
        """One line per kind, for people."""
        what = (
            (self.links, f"links to folders outside the root left out{self._advice}"),
            (self.special, "pipes, sockets or devices left out"),
            (self.unreadable, "folders that may not be listed left out"),
        )
        return [f"{len(paths)} {words}, first: {paths[0]}" for paths, words in what if paths]


def files_in(folder: Path, *, special: bool = False) -> list[Path]:
    """Files directly in a folder, hidden ones left out, sorted by name.

    Args:
        folder: the folder.
        special: also list pipes, sockets and devices.

    Returns:
        regular files, and links that lead nowhere, which cannot be read and must not be overlooked.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir()]
        return sorted(path for path in paths if special or not is_special(path))
    except OSError as problem:
        raise DataError(f"cannot be listed ({problem.strerror})", "check the permissions", path=str(folder)) from None


def walk_folders(
    top: Path, passed_over: PassedOver, *, root: Path | None = None, follow_links: bool = False
) -> Iterator[tuple[Path, list[str]]]:
    """Go through a folder and all below it; hidden names are left out.

    Args:
        top: where to start; may itself be a link.
        passed_over: takes what is left out.
        root: links are followed below it; None takes ``top``.
        follow_links: follow every link to a folder.

    Yields:
        a folder and the sorted names of its files. A link that leads nowhere counts as a file, which then cannot be
        read.
    """
    inside = (root or top).resolve()
    pending, links, seen = [top], list[Path](), set[tuple[int, int]]()
    while pending or links:
        folder = pending.pop() if pending else links.pop(0)  # real folders first: a link to one of them adds nothing
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            passed_over.unreadable.append(folder)
            continue
        files = []
        for entry in entries:
            path, kind = folder / entry.name, _kind(entry)
            if kind == "folder":
                pending.append(path)
            elif kind == "file":
                files.append(entry.name)
            elif kind == "special":
                passed_over.special.append(path)
            elif follow_links or path.resolve().is_relative_to(inside):
                links.append(path)
            else:
                passed_over.links.append(path)
        yield folder, files


def _kind(entry: os.DirEntry[str]) -> str:
    """``folder``, ``link`` to one, ``file`` (also a link that leads nowhere) or ``special``."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        if entry.is_dir():
            return "link"
        return "file" if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)) else "special"
    except OSError:  # links in a circle, or no right to look
        return "file"
