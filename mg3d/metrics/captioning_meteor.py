"""METEOR, always named by its kind: the Java program and NLTK's function give different numbers for the same text.

On two sentence pairs the program gives .24 and .31, NLTK .45 and .52. What cannot be computed is absent, never zero.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import numpy as np

from mg3d.atomic import writing
from mg3d.errors import EnvironmentProblem, RunFailedError

JAR_VARIABLE = "MG3D_METEOR_JAR"
"""Environment variable with the path of ``meteor-1.5.jar``; else the one in the package pycocoevalcap is used."""

_SEGMENT = re.compile(r"^Segment (\d+) score:\s*(\S+)", re.MULTILINE)
_FINAL = re.compile(r"^Final score:\s*(\S+)", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def find_jar() -> Path:
    """The METEOR 1.5 program.

    Raises:
        EnvironmentProblem: it is not there.
    """
    named = os.environ.get(JAR_VARIABLE)
    package = util.find_spec("pycocoevalcap")
    places = [*package.submodule_search_locations] if package and package.submodule_search_locations else []
    jar = Path(named).expanduser() if named else Path(next(iter(places), "")) / "meteor" / "meteor-1.5.jar"
    if not jar.is_file():
        raise EnvironmentProblem(
            f"no METEOR program{f' at {named}' if named else ''}",
            f"pip install --no-deps pycocoevalcap, or set {JAR_VARIABLE} to meteor-1.5.jar",
        )
    return jar.resolve()


def meteor_java(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], timeout_s: float = 600.0
) -> tuple[float, np.ndarray]:
    """METEOR 1.5 (Denkowski and Lavie, 2014) with the options of coco-caption: English, text normalised.

    The program runs in a process of its own, killed when it takes longer than the limit; line breaks and control
    characters in the text become blanks first, since it pairs the texts by lines.

    Args:
        references: [D][>= 1] texts.
        hypotheses: [D] texts; an empty one scores 0.
        timeout_s: limit in seconds.

    Returns:
        The score of the corpus (from summed statistics, not the mean of cases) and of each case [D].

    Raises:
        EnvironmentProblem: Java or the program is missing.
        RunFailedError: it failed or ran past the limit.
    """
    java, jar = shutil.which("java"), find_jar()
    if java is None:
        raise EnvironmentProblem("METEOR needs Java, and there is no java on the PATH", "install a Java 8 or newer")
    most = max(len(group) for group in references)
    padded = [[*group, *[group[-1]] * (most - len(group))] for group in references]
    with tempfile.TemporaryDirectory(prefix="mg3d_meteor_") as folder:
        generated, wanted = Path(folder, "hypotheses"), Path(folder, "references")
        _write_lines(generated, hypotheses)
        _write_lines(wanted, [text for group in padded for text in group])
        options = ["-l", "en", "-norm", "-r", str(most)]
        program = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), str(generated), str(wanted), *options]
        told = _run(program, timeout_s)
    return _read(told, len(hypotheses))


def _write_lines(path: Path, texts: Sequence[str]) -> None:
    lines = (" ".join(_CONTROL.sub(" ", text).split()) for text in texts)
    with writing(path, "free some space there, or name another folder of temporary files as TMPDIR"):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")


def _run(program: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            program, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailedError(
            f"METEOR took longer than {timeout_s:g} s and was stopped", "allow more seconds, or leave it out"
        ) from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot start {program[0]}: {error.strerror}", "mend the Java there") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunFailedError(f"METEOR failed: {lines[-1][:200]}", "see whether java -version works")
    return done.stdout


def _read(told: str, cases: int) -> tuple[float, np.ndarray]:
    segments = {int(number): float(value) for number, value in _SEGMENT.findall(told)}
    final = _FINAL.search(told)
    if final is None or sorted(segments) != list(range(1, cases + 1)):
        raise RunFailedError(f"METEOR scored {len(segments)} of {cases} cases", "report this with the texts")
    return float(final[1]), np.asarray([segments[number] for number in range(1, cases + 1)])


def meteor_nltk(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> tuple[float, np.ndarray]:
    """NLTK's METEOR: exact words, Porter stems and WordNet synonyms; the mean of cases.

    Args:
        references: tokens joined by blanks, [D][>= 1].
        hypotheses: tokens joined by blanks, [D].

    Returns:
        The mean and the score of each case [D].

    Raises:
        EnvironmentProblem: NLTK or its WordNet data is missing.
    """
    try:
        from nltk.translate.meteor_score import meteor_score

        pairs = zip(references, hypotheses, strict=True)
        scores = [meteor_score([text.split() for text in group], text.split()) for group, text in pairs]
    except ImportError as error:
        raise EnvironmentProblem("NLTK is not installed", "pip install nltk") from error
    except LookupError as error:
        raise EnvironmentProblem("NLTK's WordNet data is missing", "python -m nltk.downloader wordnet") from error
    return float(np.mean(scores)), np.asarray(scores)
