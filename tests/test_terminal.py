"""A terminal without the letters of a text prints escapes, and no text of others steers it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from mg3d.errors import ConfigError, DataError, OutputError
from mg3d.terminal import neutral, tolerate_any_encoding


def test_an_ascii_terminal_ends_no_run(repository: Path) -> None:
    code = "from mg3d.terminal import tolerate_any_encoding as t; t(); print('caf\\u00e9\\u2026')"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=plain, capture_output=True, check=True)
    assert done.stdout == b"caf\\xe9\\u2026" + os.linesep.encode()


HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x9bd\u202ee\u2066f\x00g\x7fh\u2028i"


def steers(text: str) -> bool:
    return any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066\u2028" for c in text)


def test_a_text_of_others_cannot_steer_the_terminal() -> None:
    assert steers(HOSTILE) and not steers(neutral(HOSTILE))
    assert neutral("\u4e2d\u6587 caf\u00e9 \U0001f600\n\ttab") == "\u4e2d\u6587 caf\u00e9 \U0001f600\n\ttab"
    assert json.loads(neutral(json.dumps({"a": HOSTILE}, ensure_ascii=False))) == {"a": HOSTILE}


def test_errors_show_names_and_headers_as_one_line() -> None:
    error = DataError(f"header says {HOSTILE}", f"mend {HOSTILE}", path=f"{HOSTILE}\nerror: forged", case_id="x\ny")
    assert not steers(str(error)) and not steers(error.message) and not steers(error.remedy)
    assert "\nerror: forged" not in str(error)
    assert not steers(str(ConfigError(HOSTILE))) and not steers(str(OutputError(HOSTILE, "full", HOSTILE)))


def test_output_log_lines_and_progress_of_a_command_are_neutral(repository: Path) -> None:
    code = f"""
import logging, sys
from tqdm import tqdm
from mg3d.command_line import exit_code_of
hostile = {HOSTILE!r}
def work():
    logging.basicConfig(level=logging.INFO)
    print("table", hostile)
    sys.stderr.write("left out " + hostile + "\\n")
    logging.warning("scan %s", hostile)
    for _ in tqdm(range(2), desc=hostile, ncols=60):
        pass
    raise OSError(28, "full", hostile)
sys.exit(exit_code_of(work, disk_code=1, disk_remedy="free", interrupted=""))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 1 and "100%" in err and err.count("\\u202e") >= 4
    assert not steers(out) and not steers(err.replace("\r", ""))
    assert "\rc" not in err  # the carriage return of the text; those of the bar are its own


def test_two_nested_bars_draw_what_they_draw_without_the_filter() -> None:
    def drawn(filtered: bool) -> bytes:
        stream, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline=""), sys.stderr
        sys.stderr = stream
        try:
            if filtered:
                tolerate_any_encoding()
            for position in (0, 1):
                with tqdm(total=3, position=position, file=stream, mininterval=0, bar_format="{n}", ascii=True) as bar:
                    bar.update(1)
            stream.flush()
            return stream.buffer.getvalue()  # type: ignore[attr-defined]
        finally:
            sys.stderr = before

    assert b"\x1b[A" in drawn(False) and drawn(True) == drawn(False)


def test_a_progress_bar_still_draws_on_one_line() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    before = sys.stderr
    sys.stderr = stream
    try:
        tolerate_any_encoding()
        for text in ("\r 10%", "\n\n\x1b[A\x1b[A", "\r     \r", "\n", "\x1b[A"):
            print(text, end="", file=stream)
        stream.flush()
        assert stream.buffer.getvalue() == b"\r 10%\n\n\x1b[A\x1b[A\r     \r\n\x1b[A"  # type: ignore[attr-defined]
    finally:
        sys.stderr = before
