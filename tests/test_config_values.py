"""Values of config keys are plain and bounded, whether typed or read from JSON; Sacred's own flags are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mg3d.config import ex
from mg3d.config_cli import compose_config, parse_command_line
from mg3d.config_values import parse_updates, read_config_file
from mg3d.errors import ConfigError

DEEP = 5000
FILES = {
    "deep dictionaries": ('{"loss_names": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}", "loss_names"),
    "deep lists": ('{"seed": 1, "datasets": ' + "[" * DEEP + "]" * DEEP + "}", "datasets"),
    "deeper than any key": ('{"vision_encoder_options": ' + "[" * 40 + "]" * 40 + "}", "vision_encoder_options"),
    "dotted key": ('{"loss_names.itc": 1}', "loss_names.itc"),
    "dotted inner key": ('{"loss_names": {"a.b": 1}}', "loss_names.a.b"),
    "key twice": ('{"seed": 1, "seed": 2}', "seed"),
    "inner key twice": ('{"loss_names": {"itc": 1, "itc": 2}}', "itc"),
    "object tag": ('{"vision_encoder_options": {"py/object": "os.system"}}', "py/object"),
    "object tag in a list": ('{"datasets": [{"py/tuple": [1]}]}', r"datasets\[0\]"),
    "tag that calls": ('{"loss_names": {"py/reduce": [{"py/function": "os.system"}, ["true"]]}}', "py/reduce"),
    "tag at the top": ('{"py/state": {}}', "py/state"),
    "infinite number": ('{"learning_rate": 1e999}', "learning_rate"),
    "number of many digits": ('{"seed": ' + "9" * 6000 + "}", "seed"),
    "number of thirty digits": ('{"max_steps": ' + "9" * 30 + "}", "max_steps"),
    "not a number": ('{"learning_rate": NaN}', "learning_rate"),
    "minus infinity": ('{"loss_names": {"itc": -Infinity}}', "loss_names.itc"),
    "escape sequence": (json.dumps({"data_root": "a\x1b[31m"}), "data_root"),
    "no key": (json.dumps({"": 1}), "name of a key"),
    "line feed in a key": (json.dumps({"seed\nerror: forged": 1}), "seed.u000aerror"),
    "list": ("[1]", "no dictionary"),
    "not JSON": ("{seed: 1}", "cannot be read"),
    "no text": ("\ufeff", "cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_config_file_is_refused_by_key(tmp_path: Path, kind: str) -> None:
    text, named = FILES[kind]
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=named) as caught:
        parse_command_line(ex, ["check", "with", str(path)])
    assert caught.value.exit_code == 2 and caught.value.remedy and len(str(caught.value)) < 700


def test_bytes_pipes_folders_and_huge_files_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge.json").write_text('{"exp_name": "' + "a" * (5 << 20) + '"}')
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("bytes", "huge", "pipe", "folder", "absent"):
        with pytest.raises(ConfigError, match=f"{name}.json"):
            read_config_file(str(tmp_path / f"{name}.json"))


def test_a_config_file_of_usual_values_is_read_as_it_is(tmp_path: Path) -> None:
    content = {
        "seed": 3,
        "loss_names": {"itc": 0.5},
        "datasets": ["clm_ct_rate"],
        "resume_from": None,
        "evaluate": False,
    }
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert read_config_file(str(tmp_path / "config.json")) == content
    assert compose_config(ex, [str(tmp_path / "config.json")]).seed == 3


@pytest.mark.parametrize(
    "word, named",
    [
        ("datasets={'py/object': 'os.system'}", "py/object"),
        ("loss_names={'py/reduce': [{'py/function': 'os.system'}, ['true']]}", "py/reduce"),
        ("loss_names={'itc': 1, 'itc': 2}", "itc"),
        ("loss_names={1: 2}", "loss_names"),
        ("datasets={1, 2}", "type set"),
        ("seed=1j", "type complex"),
        ("learning_rate=1e999", "learning_rate"),
        ("seed=" + "9" * 4000, "seed"),
        ("seed=" + "[" * 150, "seed"),
        ("datasets=" + "(" * 3000, "datasets"),
        ("exp_name=" + "a" * 200_000, "exp_name"),
        ("data_root=a\x1b]0;title\x07", "data_root"),
        ("loss_names..itc=1", "loss_names"),
        ("loss_names.=1", "loss_names"),
    ],
)
def test_a_hostile_value_on_the_command_line_is_refused_by_key(word: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse_updates([word])
    assert len(str(caught.value)) < 700


def test_no_tag_of_a_command_line_builds_an_object(tmp_path: Path, repository: Path) -> None:
    marker = tmp_path / "marker"
    call = {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(marker)]}]}
    done = subprocess.run(
        [sys.executable, "main.py", "check", "with", f"loss_names={call}"],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 2 and "loss_names" in done.stderr and "Traceback" not in done.stderr
    assert not marker.exists()


def test_usual_words_mean_what_they_meant() -> None:
    found = parse_updates(["a=1", "b=1e-3", "c=text with blanks", "d=[1, 'x']", "e.f=True", "e.g=None", "h=a=b", "i="])
    assert found == {
        "a": 1,
        "b": 1e-3,
        "c": "text with blanks",
        "d": [1, "x"],
        "e": {"f": True, "g": None},
        "h": "a=b",
        "i": "",
    }
    with pytest.raises(ConfigError, match="whole and in parts"):
        parse_updates(["e=1", "e.f=2"])
    with pytest.raises(ConfigError, match="whole and in parts"):
        parse_updates(["e.f=2", "e.f.g=3"])


FLAGS = ["-m db", "--mongo_db=host:1:db", "-sfoo", "--sql=x", "-l INFO", "-F dir", "--file_storage=dir", "-p", "-d"]
FLAGS += [
    "-C no",
    "-t x",
    "-S s3://x",
    "-q",
    "-D",
    "-e",
    "-u",
    "-f",
    "-i 3",
    "-n name",
    "-c text",
    "-P 1",
    "-b 2",
    "-x",
]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_sacred_is_refused_by_name(flag: str) -> None:
    for words in (["check", *flag.split(), "with", "tiny"], [*flag.split(), "check"], ["with", "tiny", *flag.split()]):
        with pytest.raises(ConfigError, match=flag.split()[0].partition("=")[0]) as caught:
            parse_command_line(ex, words)
        assert caught.value.exit_code == 2


def test_a_benchmark_refuses_them_too(repository: Path) -> None:
    command = [sys.executable, "downstream/ACDC/main.py", "with", "phantom", "-F", "dir"]
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "--file_storage" in done.stderr and len(done.stderr.splitlines()) <= 5


@pytest.mark.parametrize("command", ["save_config", "print_dependencies"])
def test_commands_of_sacred_that_have_no_use_here_are_refused(command: str) -> None:
    with pytest.raises(ConfigError, match=command):
        parse_command_line(ex, [command])
