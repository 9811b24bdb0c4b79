"""Report scores: recorded values, pycocoevalcap itself, and what happens at the edges."""

from __future__ import annotations

import json
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from mg3d.errors import ConfigError, DataError, EnvironmentProblem, RunFailedError
from mg3d.metrics.captioning import METRICS, CaptionScores, score_captions
from mg3d.metrics.captioning_meteor import JAR_VARIABLE, meteor_java, meteor_nltk
from mg3d.metrics.captioning_ngrams import cider, count_ngrams
from mg3d.metrics.captioning_rouge import common_subsequence
from mg3d.metrics.captioning_text import tokenise
from mg3d.metrics.porter_stemmer import stem

REFERENCES = (
    "the lungs are clear . no pleural effusion .",
    "heart size is normal . small nodule in the right upper lobe .",
    "bilateral pleural effusion with atelectasis .",
)
HYPOTHESES = (
    "the lungs are clear . no effusion is seen .",
    "heart is normal . a small nodule in the left lower lobe .",
    "no pleural effusion .",
)
COCO_NAMES = {f"bleu_{n}": f"Bleu_{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE_L", "cider": "CIDEr"}


def plain(references, hypotheses, **options) -> CaptionScores:
    return score_captions(references, hypotheses, pretokenised=True, **{"meteor": "none", **options})


def recorded_cases(reference_dir: Path) -> list[tuple[list, list, dict[str, float]]]:
    folder = reference_dir / "expected"
    synthetic = json.loads((folder / "caption_metrics.json").read_text(encoding="utf-8"))
    examples = json.loads((folder / "caption_metrics_nlgeval_examples.json").read_text(encoding="utf-8"))
    pairs = synthetic["pairs"]
    assert pairs and examples["cases"]
    found = [([pair["ref"] for pair in pairs], [pair["hyp"] for pair in pairs], synthetic["pycocoevalcap"])]
    return found + [(case["refs"], case["hyps"], case["scores"]) for case in examples["cases"]]


def test_the_recorded_three_pairs() -> None:
    for pretokenised in (True, False):
        found = score_captions(REFERENCES, HYPOTHESES, pretokenised=pretokenised, meteor="none").values
        bleu = [found[f"bleu_{n}"] for n in range(1, 5)]
        assert bleu == pytest.approx([0.749498, 0.600935, 0.487697, 0.396998], abs=1e-6)
        assert found["rouge_l"] == pytest.approx(0.732840, abs=1e-6)
        assert found["cider"] == pytest.approx(3.455521, abs=1e-6)
        assert found["meteor_java"] is None and found["meteor_nltk"] is None


def test_the_recorded_files(reference_dir: Path) -> None:
    for references, hypotheses, expected in recorded_cases(reference_dir):
        found = plain(references, hypotheses).values
        for name, coco in COCO_NAMES.items():
            assert found[name] == pytest.approx(expected[coco], abs=1e-6), coco


def test_the_recorded_rouge_of_another_tool(reference_dir: Path) -> None:
    folder = reference_dir / "expected"
    content = json.loads((folder / "caption_metrics.json").read_text(encoding="utf-8"))
    found = plain([pair["ref"] for pair in content["pairs"]], [pair["hyp"] for pair in content["pairs"]]).values
    for name, other in {"rouge1_f": "rouge1", "rouge2_f": "rouge2", "rougel_f": "rougeL"}.items():
        assert found[name] == pytest.approx(content["rouge_score_fmeasure"][other], abs=1e-6), name
    assert found["rouge_l"] != pytest.approx(found["rougel_f"], abs=1e-2)


def test_stems() -> None:
    words = {
        "effusions": "effus", "studies": "studi", "dies": "die", "dying": "die", "dilated": "dilat", "hopping": "hop",
        "falling": "fall", "filing": "file", "agreed": "agre", "feed": "feed", "tied": "tie", "tried": "tri",
        "opacity": "opac", "opacification": "opacif", "say": "say", "normally": "normal", "radiology": "radiolog",
        "controlled": "control", "adjustment": "adjust", "adoption": "adopt", "rate": "rate", "cease": "ceas",
        "carefully": "care", "generally": "gener", "news": "news", "as": "as", "probable": "probabl",
    }  # fmt: skip
    assert {word: stem(word) for word in words} == words


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor_of_the_recorded_files(reference_dir: Path) -> None:
    for references, hypotheses, expected in recorded_cases(reference_dir)[
        :2
    ]:  # one start of the program takes ten seconds
        found = plain(references, hypotheses, meteor="java")
        assert found.values["meteor_java"] == pytest.approx(expected["METEOR"], abs=1e-6)
        assert len(found.per_case["meteor_java"]) == len(hypotheses)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocoevalcap(seed: int) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = random.Random(seed)

    def text(low: int) -> str:
        return " ".join(rng.choice("abcdefghij") for _ in range(rng.randint(low, 30)))

    references = [[text(1) for _ in range(rng.randint(1, 4))] for _ in range(25)]
    hypotheses = [rng.choice([text(0), rng.choice(group), text(1)]) for group in references]
    gts, res = dict(enumerate(references)), {case: [text] for case, text in enumerate(hypotheses)}
    bleu, bleu_cases = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouge_cases = Rouge().compute_score(gts, res)
    cider_value, cider_cases = Cider().compute_score(gts, res)
    found = plain(references, hypotheses)
    wanted = {f"bleu_{n + 1}": (bleu[n], bleu_cases[n]) for n in range(4)}
    wanted |= {"rouge_l": (rouge, rouge_cases), "cider": (cider_value, cider_cases)}
    for name, (value, cases) in wanted.items():
        assert found.values[name] == pytest.approx(value, abs=1e-9), name
        np.testing.assert_allclose(found.per_case[name], cases, atol=1e-9, err_msg=name)


def test_cider_d_of_a_published_example_and_the_plain_one() -> None:
    references = [
        ["a man speaks", "someone speaks", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    counts = count_ngrams(references, ["a man is speaking", "rain falls"])
    assert cider(counts).mean() == pytest.approx(0.9614, abs=1e-4)
    assert cider(counts) == pytest.approx([1.3641, 0.5587], abs=1e-4)
    # without penalty and clipping nothing gets worse, and a copy of the only reference is perfect
    assert (cider(counts, sigma=None) >= cider(counts) - 1e-12).all()
    copies = count_ngrams([["a b c d e"], ["f g h i"]], ["a b c d e", "f g h i"])
    assert cider(copies, sigma=None) == pytest.approx([10.0, 10.0])


def test_common_subsequence_against_the_table() -> None:
    rng = random.Random(0)
    for _ in range(50):
        first, second = ([rng.choice("abcd") for _ in range(rng.randint(0, 70))] for _ in range(2))
        row = [0] * (len(first) + 1)
        for token in second:
            previous = row[:]
            for column, other in enumerate(first, start=1):
                row[column] = previous[column - 1] + 1 if token == other else max(previous[column], row[column - 1])
        assert common_subsequence(first, second) == row[-1]


def test_empty_generations_score_zero_and_are_named() -> None:
    found = score_captions(REFERENCES, ["", *HYPOTHESES[1:]], meteor="none")
    assert all(values[0] == pytest.approx(0.0, abs=1e-9) for values in found.per_case.values())
    assert "1 of 3 generations are empty" in found.notes[0]
    nothing = score_captions(REFERENCES, ["", " \n", ""], meteor="none")
    assert [nothing.values[name] for name in METRICS[:9]] == pytest.approx([0.0] * 9, abs=1e-9)


def test_one_document_has_no_cider_and_says_so() -> None:
    found = score_captions(REFERENCES[:1], HYPOTHESES[:1], meteor="none")
    assert found.values["cider"] == 0.0 and found.values["bleu_1"] > 0.5
    assert any("one document" in note for note in found.notes)


def test_line_breaks_are_blanks() -> None:
    broken = [text.replace(" ", "\r\n", 1).replace(" no ", "\n\u2028no\t") + "\n" for text in HYPOTHESES]
    for pretokenised in (True, False):
        whole = score_captions(REFERENCES, HYPOTHESES, pretokenised=pretokenised, meteor="none")
        assert score_captions(REFERENCES, broken, pretokenised=pretokenised, meteor="none").values == whole.values


def test_tokens_of_raw_text() -> None:
    assert tokenise("Nodule of 0.8 x 1.0cm; follow-up (CT).\nNo effusion!") == (
        "nodule of 0.8 x 1.0 cm ; follow-up ( ct ) . no effusion !"
    )
    assert tokenise(REFERENCES[0]) == REFERENCES[0]
    untouched = score_captions(["Ab ab"], ["ab ab"], pretokenised=True, meteor="none")
    assert untouched.values["bleu_1"] == pytest.approx(0.5)
    assert score_captions(["Ab ab"], ["ab ab"], meteor="none").values["bleu_1"] == pytest.approx(1.0)
    assert untouched.protocol["text"] != score_captions(["a"], ["a"], meteor="none").protocol["text"]


def test_intervals_hold_the_value_and_follow_the_seed() -> None:
    rng = random.Random(1)
    references = [" ".join(rng.choice("abcdefg") for _ in range(20)) for _ in range(60)]
    hypotheses = [" ".join(word for word in text.split() if rng.random() < 0.8) for text in references]
    found = plain(references, hypotheses, rounds=200)
    for name in METRICS[:9]:
        low, high = found.intervals[name]
        assert low < found.values[name] < high
        assert found.entries()[name] == {"mean": found.values[name], "ci95": [low, high], "n": 60}
    assert plain(references, hypotheses, rounds=200).intervals == found.intervals
    assert plain(references, hypotheses, rounds=200, seed=1).intervals != found.intervals
    patients = [str(case // 6) for case in range(60)]
    assert plain(references, hypotheses, rounds=200, groups=patients).intervals != found.intervals


def test_unusable_input_is_refused() -> None:
    with pytest.raises(DataError, match="empty reference: b"):
        score_captions(["a", " "], ["a", "b"], ids=["a", "b"], meteor="none")
    with pytest.raises(DataError, match="0 references"):
        score_captions([], [], meteor="none")
    with pytest.raises(DataError, match="2 references and 1"):
        score_captions(["a", "b"], ["a"], meteor="none")
    with pytest.raises(ConfigError, match="jar"):
        score_captions(["a"], ["a"], meteor="jar")  # type: ignore[arg-type]


def fake_java(folder: Path, script: str) -> None:
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def jar_and_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on the PATH for a stand-in of java, and a file in place of the program."""
    (tmp_path / "meteor.jar").write_bytes(b"")
    monkeypatch.setenv(JAR_VARIABLE, str(tmp_path / "meteor.jar"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_hanging_or_failing_meteor_is_stopped_and_absent(jar_and_java: Path) -> None:
    fake_java(jar_and_java, "exec sleep 60")
    with pytest.raises(RunFailedError, match=r"longer than 0\.5 s"):
        meteor_java([["a"]], ["a"], timeout_s=0.5)
    found = score_captions(["a b"], ["a b"], meteor_timeout_s=0.5)
    assert found.values["meteor_java"] is None
    assert any("meteor_java not computed" in note for note in found.notes)
    fake_java(jar_and_java, "echo no heap >&2; exit 3")
    with pytest.raises(RunFailedError, match="no heap"):
        score_captions(["a b"], ["a b"], meteor="java")
    fake_java(jar_and_java, "echo 'Segment 1 score: 0.5'; echo 'Final score: 0.5'")
    with pytest.raises(RunFailedError, match="1 of 2 cases"):
        meteor_java([["a"], ["b"]], ["a", "b"])


def test_meteor_gets_one_line_per_text(jar_and_java: Path) -> None:
    copy = f'cp "$5" {jar_and_java}/h; cp "$6" {jar_and_java}/r; echo \'Segment 1 score: 0.25\''
    fake_java(jar_and_java, f"{copy}; echo 'Segment 2 score: 0.5'; echo 'Final score: 0.4'")
    value, cases = meteor_java([["one\nref", "two"], ["three"]], ["a\r\nb\x00", ""])
    assert (value, cases.tolist()) == (0.4, [0.25, 0.5])
    assert (jar_and_java / "h").read_text(encoding="utf-8") == "a b\n\n"
    assert (jar_and_java / "r").read_text(encoding="utf-8") == "one ref\ntwo\nthree\nthree\n"


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JAR_VARIABLE, str(tmp_path / "absent.jar"))
    with pytest.raises(EnvironmentProblem, match=r"absent\.jar"):
        score_captions(["a"], ["a"], meteor="java")
    (tmp_path / "absent.jar").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="Java"):
        meteor_java([["a"]], ["a"])
    monkeypatch.setitem(__import__("sys").modules, "nltk.translate.meteor_score", None)
    monkeypatch.setitem(__import__("sys").modules, "nltk", None)
    with pytest.raises(EnvironmentProblem, match="NLTK"):
        meteor_nltk([["a"]], ["a"])
    found = score_captions(["a"], ["a"])
    assert found.values["meteor_java"] is None and found.values["meteor_nltk"] is None
    assert sum("not computed" in note for note in found.notes) == 2
