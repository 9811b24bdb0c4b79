"""Process defaults, limits, and the record of what a run was made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mg3d.errors import EnvironmentProblem
from mg3d.training import environment, provenance

SCRIPT = """
import json, os, sys
from mg3d.training.environment import ensure_process_defaults
ensure_process_defaults(2)
heavy = [name for name in ("torch", "monai", "pytorch_lightning") if name in sys.modules]
print(json.dumps({"env": dict(os.environ), "argv": sys.argv, "pid": os.getpid(), "heavy": heavy}))
"""


def start(repository: Path, tmp_path: Path, environ: dict[str, str]) -> dict:
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT)
    base = {key: value for key, value in os.environ.items() if key not in _set_by_us()}
    process = subprocess.Popen(
        [sys.executable, "-B", str(script), "with", "key=a b"],
        env={**base, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": "", **environ},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    output, _ = process.communicate(timeout=60)
    return json.loads(output) | {"started_as": process.pid}


def _set_by_us() -> set[str]:
    return {*environment.PROCESS_DEFAULTS, *environment.THREAD_VARIABLES, environment.GUARD}


def test_python_starts_once_more_with_the_defaults(repository: Path, tmp_path: Path) -> None:
    seen = start(repository, tmp_path, {})
    assert environment.PROCESS_DEFAULTS.items() <= seen["env"].items()
    assert seen["env"]["OMP_NUM_THREADS"] == "2"
    assert seen["argv"][1:] == ["with", "key=a b"] and seen["pid"] == seen["started_as"]
    assert seen["heavy"] == []


def test_what_the_user_set_is_kept_and_off_is_off(repository: Path, tmp_path: Path) -> None:
    assert start(repository, tmp_path, {"MALLOC_ARENA_MAX": "4"})["env"]["MALLOC_ARENA_MAX"] == "4"
    assert "MALLOC_ARENA_MAX" not in start(repository, tmp_path, {environment.GUARD: "off"})["env"]


def test_a_visible_gpu_keeps_the_plain_allocator(tmp_path: Path) -> None:
    assert environment.cpu_only({}, tmp_path)
    (tmp_path / "nvidia0").touch()
    assert not environment.cpu_only({}, tmp_path)
    assert environment.cpu_only({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)


def test_shared_memory_too_small_names_both_figures() -> None:
    environment.check_shared_memory(0, 1 << 30, free=1)
    environment.check_shared_memory(2, 1 << 20, free=64 << 20)
    with pytest.raises(EnvironmentProblem, match=r"2 loader workers need about 256 MiB .* 64 MiB are free"):
        environment.check_shared_memory(2, 64 << 20, free=64 << 20)


def test_open_file_limit_is_raised_no_further_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [256, 2000]
    monkeypatch.setattr(environment.resource, "getrlimit", lambda which: tuple(state))
    monkeypatch.setattr(environment.resource, "setrlimit", lambda which, pair: state.__setitem__(slice(None), pair))
    assert environment.raise_open_file_limit(4096) == 2000 and state == [2000, 2000]
    assert environment.raise_open_file_limit(1000) == 2000


def test_code_state_of_a_repository_and_outside_of_one(repository: Path, tmp_path: Path) -> None:
    commit = provenance.code_state(repository)["commit"]
    assert commit is None or len(commit) == 40
    assert provenance.code_state(tmp_path) == {"commit": None, "dirty": None}


def test_data_manifest_pins_every_row(tmp_path: Path) -> None:
    import pyarrow as pa

    def write(crc: int) -> dict:
        schema = pa.schema([("row_crc32", pa.uint32())])
        with pa.ipc.new_file(str(tmp_path / "clm_ct_rate_train.arrow"), schema) as writer:
            for value in (1, crc):
                writer.write_batch(pa.record_batch([pa.array([value], pa.uint32())], schema=schema))
        return provenance.data_manifest(tmp_path, ["clm_ct_rate"])["clm_ct_rate_train.arrow"]

    first, same, other = write(2), write(2), write(3)
    assert first == same and first["rows"] == 2 and first["digest"] != other["digest"]
    (tmp_path / "clm_ct_rate_val.arrow").write_bytes(b"")
    assert "unreadable" in provenance.data_manifest(tmp_path, ["clm_ct_rate"])["clm_ct_rate_val.arrow"]
