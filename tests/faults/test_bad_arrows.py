"""Every kind of bad Arrow file through the entry: exit code 2, at most five lines with file, reason and the way out."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_job import make_job
from tiny_runs import lines, newest

NAME = "clm_ct_rate_train.arrow"
WORDS = ["with", "task_pretrain_mg3d", "tiny", "image_size=[64,32,32]", "datasets=[clm_ct_rate]", "num_gpus=0"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Good arrows, and the word that names the text encoder."""
    words = dict(word.partition("=")[::2] for word in make_job(tmp_path_factory.mktemp("job")))
    return Path(words["data_root"]), words["tokenizer"]


def cut(part: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(part * len(data))])

    return damage


def as_stream(path: Path) -> None:
    table = pa.ipc.open_file(str(path)).read_all()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def rewritten(change: Callable[[pa.RecordBatch], pa.RecordBatch] | None) -> Callable[[Path], None]:
    """Change every row; None keeps none."""

    def damage(path: Path) -> None:
        reader = pa.ipc.open_file(pa.BufferReader(path.read_bytes()))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)] if change else []
        changed = [change(batch) for batch in batches] if change else []
        schema = changed[0].schema if changed else reader.schema
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in changed:
                writer.write_batch(batch)

    return damage


def column(name: str, value: Any, kind: pa.DataType | None = None) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index(name)
        kind_now = kind or batch.schema.field(name).type
        return batch.set_column(place, pa.field(name, kind_now), pa.array([value], kind_now))

    return change


def flip_bits(path: Path) -> None:
    """One bit of the pixels of every row."""
    data = bytearray(path.read_bytes())
    reader = pa.ipc.open_file(pa.BufferReader(bytes(data)))
    for number in range(reader.num_record_batches):
        pixels = reader.get_batch(number).column("image")[0].as_py()
        data[bytes(data).index(pixels) + 9] ^= 4
    path.write_bytes(bytes(data))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    **{f"cut at {part}": (cut(part), "cannot be opened") for part in (0.001, 0.3, 0.9, 0.999)},
    "stream": (as_stream, "perhaps an Arrow stream"),
    "missing": (lambda path: path.unlink(), "expected"),
    "bit flips": (flip_bits, "checksum"),
    "missing column": (rewritten(lambda batch: batch.drop_columns(["labels"])), "column labels is missing"),
    "wrong type": (rewritten(column("image_shape", "16x12x16", pa.string())), "column image_shape has type string"),
    "no rows": (rewritten(None), "no rows"),
    "bytes against shape": (rewritten(column("image_shape", [16, 12, 17])), "needs 6528"),
    "short image": (rewritten(column("image", b"12345678")), "8 bytes"),
    "shape of two axes": (rewritten(column("image_shape", [16, 192])), "not three positive sizes"),
    "another number type": (rewritten(column("image_dtype", "float64")), "image_dtype 'float64'"),
}


def enter(repository: Path, monkeypatch: pytest.MonkeyPatch, job: tuple[Path, str], folder: Path, *words: str) -> int:
    """Exit code of main.py in this process, with the arrows of ``folder``."""
    spec = importlib.util.spec_from_file_location("mg3d_entry", repository / "main.py")
    assert spec and spec.loader
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    monkeypatch.setenv("MG3D_PROCESS_DEFAULTS", "off")
    places = [
        f"data_root={folder}",
        f"tokenizer={job[1]}",
        f"log_dir={folder / 'result'}",
        "num_gpus=0",
        "num_workers=0",
    ]
    return entry.main([*WORDS, *places, "text_encoder_random_init=True", "max_steps=1", *words])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_in_five_lines(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    job: tuple[Path, str],
    kind: str,
) -> None:
    folder = tmp_path / "arrows"
    shutil.copytree(job[0], folder)
    damage, reason = BAD[kind]
    damage(folder / NAME)
    assert enter(repository, monkeypatch, job, folder) == 2
    told = capfd.readouterr().err
    message = told[told.index("error: ") :].strip().splitlines()
    assert len(message) <= 5 and "Traceback" not in told, told
    assert NAME in message[0] and reason in message[0], message
    assert "mend: " in message[1] and len(message[1]) > 15


def test_bad_rows_can_be_left_out_and_are_counted(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    job: tuple[Path, str],
) -> None:
    folder = tmp_path / "arrows"
    shutil.copytree(job[0], folder)
    data = bytearray((folder / NAME).read_bytes())
    reader = pa.ipc.open_file(pa.BufferReader(bytes(data)))
    for number in (0, 3):
        pixels = reader.get_batch(number).column("image")[0].as_py()
        data[bytes(data).index(pixels) + 9] ^= 4
    (folder / NAME).write_bytes(bytes(data))
    words = ("on_bad_sample=skip", "max_epoch=1", "max_steps=None")
    assert enter(repository, monkeypatch, job, folder, *words, "max_bad_fraction=0.25") == 0
    told = capfd.readouterr().err
    assert told.count("skipped a study") == 2 and "clm_ct_rate_train_0" in told and "clm_ct_rate_train_3" in told
    assert lines(newest(folder / "result"))
    assert enter(repository, monkeypatch, job, folder, *words, "max_bad_fraction=0.2") == 2
    assert "2 of 8 studies cannot be read, more than max_bad_fraction 0.2 allows" in capfd.readouterr().err
