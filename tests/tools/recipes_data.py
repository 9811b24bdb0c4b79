"""Recordings of report text, masks, schedules and images; texts are written out by hand or restated plainly."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from recipes_modules import cells
from recording import Draws, Recording, Tensors
from torch.nn import functional

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", ";", "no", "small", "nodule", "lung", "##s", "clear"]
VOCAB += ["heart", "normal", "##ly", "size", "##d", "left", "stable", "follow", "up", "mild", "dilat", "##ed", "##ion"]
SPECIAL = 5


def masks() -> Recording:
    """Hidden cells of several seeds, grids and windows."""
    body = []
    for seed, dhw, ratio, window in ((2, [20, 8, 12], 0.25, 4), (9, [10, 6, 7], 0.7, 3)):
        hidden = cells(seed, tuple(math.ceil(size / window) for size in dhw), ratio)
        case = {"numpy_seed": seed, "dhw": dhw, "ratio": ratio, "window": window}
        body.append(case | {"masked_cells": np.flatnonzero(hidden).tolist(), "num_cells": hidden.size})
    results = ["0/masked_cells", "1/masked_cells", "1/num_cells"]
    return Recording("cells", "mask_rand_patch", body=body, role="json", results=results)


def _factor(case: dict[str, Any], step: int) -> float:
    warmup, total, end = case["warmup"], case["total"], case["lr_end"] / case["base_lr"]
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / (total - warmup), 1.0)
    curve = (1 + math.cos(math.pi * done)) / 2 if case["kind"] == "cosine" else (1 - done) ** case["power"]
    return end + (1 - end) * curve


def schedules() -> Recording:
    """Polynomial and cosine decay after a warm-up."""
    body = []
    for kind, base, warmup, total, end, power in (("poly", 3e-4, 5, 40, 2e-5, 3), ("cosine", 2e-3, 8, 30, 1e-4, 1)):
        case = {"kind": kind, "base_lr": base, "warmup": warmup, "total": total, "lr_end": end, "power": power}
        values = []
        for step in (0, 3, warmup, 17, 26, total, total + 4):
            factor = _factor(case, step)
            values.append({"step": step, "factor": factor, "lr_base": base * factor, "lr_x7": 7 * base * factor})
        body.append(case | {"values": values})
    results = [f"{k}/values/3/{key}" for k in (0, 1) for key in ("factor", "lr_base", "lr_x7")]
    return Recording("rates", "lr_schedule", body=body, role="json", results=results)


REPORTS = [
    ("Both lungs are clear, no nodule. Heart (size, shape) normal; stable", "No change, follow up"),
    ("A small nodule; left lung (upper lobe), stable. ", "Nodule"),
    ("No effusion,no mass in the chest", "Normal; see note."),
]
ROWS = [
    (
        "Both lungs are clear, no nodule. Heart (size, shape) normal; stableNo change, follow up",
        ["Both lungs are clear, ", "no nodule. ", "Heart (size, shape) normal; ", "stable"],
        ["No change, ", "follow up"],
    ),
    (
        "A small nodule; left lung (upper lobe), stable. Nodule",
        ["A small nodule; ", "left lung (upper lobe), ", "stable."],
        ["Nodule"],
    ),
    (
        "No effusion,no mass in the chestNormal; see note.",
        ["No effusion,", "no mass in the chest"],
        ["Normal; ", "see note."],
    ),
]
COLUMNS = [
    ["image", "list<item: binary>"],
    ["caption", "list<item: string>"],
    ["image_id", "large_string"],
    *([name, "list<item: string>"] for name in ("findings", "impression", "findings_sen", "impression_sen")),
    ["split", "large_string"],
]
FRAGMENTS = {
    "one, two; three": ["one, ", "two; ", "three"],
    "a (b; c) d,e": ["a (b; c) d,", "e"],
    " , ": [],
    "Ends. Starts, here": ["Ends. ", "Starts, ", "here"],
}
SENTENCES = {
    "Heart is stable. Lungs are clear!": ["Heart is stable.", "Lungs are clear!"],
    "Heart is normal. So are lungs.": ["Heart is normal. So are lungs."],
    "A 2.5 cm nodule. Stable": ["A 2.5 cm nodule.", "Stable"],
    "Mr. Smith came. Why? Unknown.": ["Mr. Smith came.", "Why?", "Unknown."],
    "Fig. 7 shows it. Done.": ["shows it.", "Done."],
    "\n": [],
}


def preparation() -> list[Recording]:
    """Sections, fragments and splits of three reports; and the sentence splitter."""
    reports = [{"report": report, "result": result} for report, result in REPORTS]
    rows = [
        {"texts": [text], "findings": [report.strip()], "impression": [result], "findings_sen": a, "impression_sen": b}
        for (report, result), (text, a, b) in zip(REPORTS, ROWS, strict=True)
    ]
    splits = {"train": [0, 1, 2], "val": [], "test": []}
    pandas_keys = ["index_columns", "column_indexes", "columns", "attributes", "creator", "pandas_version"]
    body = {
        "reports": reports,
        "split_of_index": splits,
        "expected": {"train": rows, "val": [], "test": []},
        "split_sentences": [{"input": key, "output": value} for key, value in FRAGMENTS.items()],
        "arrow_schema_jpg": {name: COLUMNS for name in splits} | {"pandas_metadata_keys": pandas_keys},
    }
    results = ["split_of_index/train", "expected/train/1/findings_sen", "split_sentences/1/output"]
    results += ["arrow_schema_jpg/val/2", "expected/train/0/texts"]
    cases = [{"input": key, "output": value} for key, value in SENTENCES.items()]
    return [
        Recording("sections", "text_prepro_ctrg", body=body, role="json", results=results),
        Recording("stops", "text_split_into_sents", body=cases, role="json", results=["1/output", "3/output"]),
    ]


def pieces(text: str) -> list[str]:
    """Greedy word pieces."""
    found = []
    for word in re.findall(r"\w+|[^\w\s]", text):
        start, parts = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            marked = ((("##" if start else "") + word[start:end], end) for end in ends)
            piece, start = next(((p, end) for p, end in marked if p in VOCAB), ("[UNK]", len(word) + 1))
            parts.append(piece)
        found += ["[UNK]"] if "[UNK]" in parts else parts
    return found


def ids_of(tokens: list[str]) -> list[int]:
    """Token numbers."""
    return [VOCAB.index(token) for token in tokens]


def indexed_case(findings: list[str], impression: list[str], length: int, glue: str) -> dict[str, Any]:
    """Token view of a report that fits into ``length``; ``glue`` joins the fragments."""
    texts = [fragment.lower().strip() for fragment in (*findings, *impression)]
    whole = glue.join(texts)
    tokens = ["[CLS]", *pieces(whole), "[SEP]"]
    counted = [k + 1 for k, text in enumerate(texts) for _ in pieces(text)]
    padding = length - len(tokens)
    index = [-1, *counted, -1][: len(tokens)] if glue else [-1, *counted]
    return {
        "max_text_len": length,
        "findings_sen": findings,
        "impression_sen": impression,
        "sent_level": True,
        "text": whole,
        "input_ids": ids_of(tokens + ["[PAD]"] * padding),
        "attention_mask": [1] * len(tokens) + [0] * padding,
        "sentence_index": index + [-1] * (length - len(index)),
        "sen_txt": [{"text": text, "input_ids": [ids_of(["[CLS]", *pieces(text), "[SEP]"])]} for text in texts],
    }


CASES = [
    (["Lungs clear, ", "no small nodule. "], ["Heart normally sized."]),
    (["Mild dilation; ", "left lung stable"], ["Follow up"]),
    (["No dilated heart. "], ["Normal."]),
]


def index_entry(name: str, length: int, separator: str) -> Recording:
    """Token views of all cases."""
    cases = [indexed_case(*case, length, " " if separator == "blank" else "") for case in CASES]
    body = {"vocab": VOCAB, "tokenizer": "word pieces", "cases": cases}
    results = ["cases/0/text", "cases/1/input_ids", "cases/1/sentence_index", "cases/2/sen_txt/0/input_ids/0"]
    options = {"fragment_separator": separator}
    return Recording(name, "text_sentence_index", body=body, role="json", options=options, results=results[:3])


def chosen_positions(tokens: list[str], share: float) -> list[int]:
    """Whole words at random until the share of all positions is used up; drawn from the global generator."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if words and token.startswith("##"):
            words[-1].append(position)
        else:
            words.append([position])
    random.shuffle(words)
    limit, taken = max(1, round(len(tokens) * share)), set()
    for word in words:
        if len(taken) < limit and len(taken) + len(word) <= limit:
            taken |= set(word)
    return [int(position in taken) for position in range(len(tokens))]


def whole_words(uses: str) -> Recording:
    """Chosen positions of two seeds, sequence after sequence."""
    tokens = [[VOCAB[k] for k in indexed_case(*case, 20, "")["input_ids"]] for case in CASES[:2]]
    cases = []
    for seed in (4, 12):
        random.seed(seed)
        cases.append({"python_seed": seed, "mask_labels": [chosen_positions(row, 0.15) for row in tokens]})
    body, results = {"tokens": tokens, "cases": cases}, ["cases/0/mask_labels/1", "cases/1/mask_labels/0"]
    return Recording("words to hide", "whole_word_mask", body=body, role="json", uses=[uses], results=results)


def collated(uses: str, length: int) -> Recording:
    """Padded images and masked copies of the first two cases."""
    config = {"python_seed": 21, "torch_seed": 8, "mlm_probability": 0.3}
    cases = [indexed_case(*case, length, "") for case in CASES[:2]]
    ids = torch.tensor([case["input_ids"] for case in cases])
    random.seed(config["python_seed"])
    chosen = torch.tensor([chosen_positions([VOCAB[k] for k in row], 0.3) for row in ids.tolist()]).bool()
    chosen &= ids >= SPECIAL
    torch.manual_seed(config["torch_seed"])
    replaced = torch.bernoulli(torch.full(ids.shape, 0.8)).bool() & chosen
    swapped = torch.bernoulli(torch.full(ids.shape, 0.5)).bool() & chosen & ~replaced
    drawn = torch.randint(len(VOCAB), ids.shape)
    masked = ids.clone()
    masked[replaced] = VOCAB.index("[MASK]")
    masked[swapped] = drawn[swapped]
    images = [torch.arange(24.0).view(2, 1, 3, 4), torch.arange(30.0).view(3, 1, 2, 5)]
    stacked = torch.zeros(2, 3, 1, 3, 5)
    stacked[0, :2, :, :, :4], stacked[1, :, :, :2] = images
    tensors: Tensors = {
        "image": stacked,
        "text_ids": ids,
        "text_labels": torch.full_like(ids, -100),
        "text_masks": torch.tensor([case["attention_mask"] for case in cases]),
        "text_ids_mlm": masked,
        "text_labels_mlm": torch.where(chosen, ids, -100),
    }
    tensors |= {f"in.image.{k}": image for k, image in enumerate(images)}
    tensors |= {f"sentence_index.{k}": torch.tensor(case["sentence_index"]) for k, case in enumerate(cases)}
    return Recording("batch of two", "collate_tensors", tensors, uses=[uses], config=config)


def ctrg() -> Recording:
    """Slices rebuilt from blocks, reversed, cut, cropped and resized by Pillow."""
    draws, count, depth = Draws(50), 11, 9
    config = {"slice_hw": [40, 36], "block": [5, 6], "center_crop": [30, 28], "resize": [12, 16]}
    config["crop_fraction"] = [0.1, 0.8]
    coarse = draws.grey(count, 8, 6)
    kept = list(range(count - 1, -1, -1))[int(0.1 * count) : int(0.8 * count)]
    source = [kept[position * len(kept) // depth] for position in range(depth)]
    rows = []
    for position in dict.fromkeys(source):
        full = np.kron(coarse[position].numpy(), np.ones((5, 6), np.uint8))[5:35, 4:32]
        rows.append(np.asarray(Image.fromarray(full).resize((16, 12), Image.Resampling.BICUBIC)))
    unique = torch.from_numpy(np.stack(rows)).float() / 255
    places = torch.tensor([list(dict.fromkeys(source)).index(position) for position in source])
    tensors = {"coarse_u8": coarse, "unique_slices": unique, "slice_map": places}
    results = ["unique_slices", "slice_map"]
    tolerance = {"rtol": 0.0, "atol": 4.5e-3}
    return Recording("slices", "image_ctrg", tensors, config=config, results=results, tolerance=tolerance)


def preprocessed(name: str, sampled: bool) -> Recording:
    """Crop and resize of a stored volume ``[Z, X, Y]``."""
    stored = Draws(51).normal(10, 14, 12, scale=0.6)
    cropped = ((stored[1:9, 4:11, 3:9] + 1) / 2).clamp(0, 1).transpose(1, 2)
    size = (6, 4, 8)
    out = functional.interpolate(cropped[None, None].double(), size, mode="trilinear").float()[0, 0].unsqueeze(1)
    tensors, config = {"in.arr_0": stored}, {"fractions": [0.8, 0.55, 0.5]}
    if sampled:
        config["size"] = size
        tensors |= {"out_slice": out[::2, :, ::2, ::4], "out_mean_std": torch.stack([out.mean(), out.std()])}
    else:
        tensors["out"] = out
    return Recording(name, "image_ct_rate", tensors, config=config)


def resampled() -> Recording:
    """Slope, window and target spacing of a stored scan ``[X, Y, Z]``."""
    raw = Draws(52).integers(0, 2600, 9, 7, 6).to(torch.int16)
    meta = {"RescaleSlope": 2.0, "RescaleIntercept": -1500.0, "XYSpacing": "[0.9, 0.9]", "ZSpacing": 2.0}
    config = {"meta": meta, "target_spacing": {"z": 1.2, "xy": 0.6}}
    values = (raw.double() * 2 - 1500).clamp(-1000, 1000) / 1000
    size = (int(6 * (2.0 / 1.2)), int(9 * (0.9 / 0.6)), int(7 * (0.9 / 0.6)))
    out = functional.interpolate(values.permute(2, 0, 1)[None, None], size, mode="trilinear")[0, 0].float()
    return Recording("offline", "ct_rate_nifti_to_npz", {"in.raw_xyz": raw, "out.arr_0": out}, config=config)


def recordings() -> list[Recording]:
    """Everything of this file."""
    return [
        masks(),
        schedules(),
        *preparation(),
        index_entry("glued", 20, "none"),
        index_entry("spaced", 22, "blank"),
        whole_words("glued"),
        collated("glued", 20),
        ctrg(),
        preprocessed("whole volume", False),
        preprocessed("volume sample", True),
        resampled(),
    ]
