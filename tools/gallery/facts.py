"""What the packing wrote down about a data set: exclusions, warnings, decisions and the grids as acquired."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tools.gallery.items import MAX_LISTED_IDS

_FIGURE: Final = re.compile(r"-?\d[\d.,x]*|'[^']*'|\([^)]*\)")
_SETTINGS: Final = (
    "split_protocol",
    "store",
    "size",
    "target_spacing_mm",
    "crop_fractions",
    "window_hu",
    "rescale",
    "orientation",
    "empty_report",
    "seed",
    "limit",
)


@dataclass
class Reasons:
    """Scans grouped by the reason given for them, figures left out."""

    groups: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, image_id: str) -> None:
        """Count one scan."""
        key = " ".join(_FIGURE.sub("…", reason).split())
        self.counts[key] += 1
        examples = self.groups.setdefault(key, [])
        if len(examples) < MAX_LISTED_IDS:
            examples.append(image_id)

    def table(self) -> list[tuple[str, int, list[str]]]:
        """Reason, number of scans, first ids; the most frequent first."""
        return [(reason, count, self.groups[reason]) for reason, count in self.counts.most_common()]


@dataclass
class Facts:
    """What the manifests of one corpus say.

    Attributes:
        exclusions: scans that were left out.
        warnings: packed scans with an oddity.
        decisions: how values became HU, and where the orientation came from -> scans.
        acquired_sizes: voxels per axis (D, H, W) before packing -> scans.
        acquired_spacing: mm per axis (z, y, x) before packing -> scans.
        settings: settings of the packing, name to value.
        files: name, rows and digest of each packed file.
        mismatches: files whose rows and manifest disagree.
    """

    exclusions: Reasons = field(default_factory=Reasons)
    warnings: Reasons = field(default_factory=Reasons)
    decisions: Counter[str] = field(default_factory=Counter)
    acquired_sizes: tuple[Counter[int], ...] = field(default_factory=lambda: tuple(Counter() for _ in range(3)))
    acquired_spacing: tuple[Counter[float], ...] = field(default_factory=lambda: tuple(Counter() for _ in range(3)))
    settings: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, int, str]] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set)

    def add(self, manifest: Mapping[str, Any]) -> None:
        """Take one manifest in; the exclusions it shares with the corpus' other manifests count once."""
        for item in _records(manifest.get("exclusions")):
            key = (str(item.get("image_id", "")), str(item.get("reason", "")))
            if key not in self._seen:
                self._seen.add(key)
                self.exclusions.add(key[1], key[0])
        for case in _records(manifest.get("cases")):
            self._add_case(case)
        self._add_settings(manifest)
        if "file" in manifest:
            rows, name = manifest.get("rows"), str(manifest["file"])
            self.files.append((name, int(manifest["rows_in_file"]), str(manifest.get("sha256", ""))[:12]))
            if rows != manifest["rows_in_file"]:
                self.mismatches.append(f"{name}: {manifest['rows_in_file']} rows, its manifest says {rows}")

    def _add_case(self, case: Mapping[str, Any]) -> None:
        for warning in case.get("warnings") or ():
            self.warnings.add(str(warning), str(case.get("image_id", "")))
        for key, words in (("rescale", "HU values"), ("orientation", "directions")):
            if key in case:
                self.decisions[f"{words}: {str(case[key]).replace('_', ' ')}"] += 1
        for counter, size in zip(self.acquired_sizes, case.get("stored_shape_DHW") or (), strict=False):
            counter[int(size)] += 1
        for steps, step in zip(self.acquired_spacing, case.get("stored_spacing_mm") or (), strict=False):
            steps[round(float(step), 3)] += 1

    def _add_settings(self, manifest: Mapping[str, Any]) -> None:
        config = manifest.get("config")
        config = config if isinstance(config, Mapping) else {}
        geometry = config.get("geometry")
        config = {**config, **geometry} if isinstance(geometry, Mapping) else config
        for name in _SETTINGS:
            if config.get(name) is not None:
                value = config[name]
                shown = " ".join(str(part) for part in value) if isinstance(value, list) else str(value)
                self.settings[name.replace("_", " ")] = shown
        code = manifest.get("code")
        if isinstance(code, Mapping):
            self.settings["packed by"] = f"mg3d {code.get('mg3d', '?')}, commit {code.get('commit') or '?'}"


def gather(manifests: Iterable[Mapping[str, Any]]) -> dict[str, Facts]:
    """Summarise manifests per corpus."""
    facts: dict[str, Facts] = {}
    for manifest in manifests:
        facts.setdefault(str(manifest.get("corpus", "")), Facts()).add(manifest)
    return facts


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
