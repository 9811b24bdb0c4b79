"""The mutation check: what it plants, and that a test decides."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import mutation_check

SOURCE = """
LIMIT = 3

def larger(a: int, b: int = 2) -> bool:
    '''Text with 7.'''
    if a > b and not a == LIMIT:
        raise ValueError(f"{a + 1}")
    return a + b > 0
"""


def test_faults_are_planted_where_they_matter() -> None:
    changed = [text for _, _, text in mutation_check.mutants(SOURCE)]
    assert len(set(changed)) == len(changed), "no two alike"
    assert ast.unparse(ast.parse(SOURCE)) not in changed
    wanted = ("LIMIT = 4", "int=3", "if a >= b and", "if a > b or", "a != LIMIT", "return a - b", "return None", "> 1")
    assert [words for words in wanted if not any(words in text for text in changed)] == []
    assert all("raise ValueError(f'{a + 1}')" in text and "Text with 7." in text for text in changed)


@pytest.mark.slow
def test_a_tested_function_is_told_from_an_untested_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("def double(a):\n    return a * 2\n\n\ndef half(a):\n    return a / 2\n")
    (tmp_path / "test_planted.py").write_text("import planted\n\n\ndef test():\n    assert planted.double(3) == 6\n")
    monkeypatch.setattr(mutation_check, "ROOT", tmp_path)
    monkeypatch.setitem(mutation_check.TESTS, "planted.py", [str(tmp_path / "test_planted.py")])
    monkeypatch.syspath_prepend(str(tmp_path))
    row = mutation_check.check("planted.py", 0, 0, float("inf"))
    assert row == {"mutants": 6, "tried": 6, "killed": 3, "percent": 50.0}
