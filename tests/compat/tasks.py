"""The tasks of the table: their rows, and how plain `transformers` predicts from an exported folder."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from PIL import Image

from compat.architectures import SIDE

Row = dict[str, Any]
Answers = list[Any]
"""One answer per row: a text, a list of texts, or numbers by name."""
TARGET_TOKENS, COMPLETION_TOKENS = 6, 8
BATCH_ROWS = 4


@dataclass(frozen=True)
class Exported:
    """An exported folder as plain `transformers` (and `peft`, for adapters) loads it."""

    folder: Path
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Case:
    """One task. `plain` predicts without the product; `ours` is what it must equal, of one prediction."""

    fields: Row
    row: Callable[[Row], Row]
    """A sentence with its label (see `tiny.labeled`) as a row of the task."""
    plain: Callable[[Exported, Sequence[Row]], Answers]
    ours: Callable[[Row], Any]
    job: Row = field(default_factory=dict)
    packed: bool = False
    """Rows are packed unless the job says otherwise."""


def classified(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The best label and its score, by the pipeline."""
    found = _text_pipeline(exported)([row["text"] for row in rows])
    return [{one["label"]: one["score"]} for one in found]


def several_labels(exported: Exported, rows: Sequence[Row]) -> Answers:
    """Every label's probability, by the pipeline."""
    run = _text_pipeline(exported, top_k=None, function_to_apply="sigmoid")
    found = run([row["text"] for row in rows])
    return [{one["label"]: one["score"] for one in of_row} for of_row in found]


def numbers(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The output itself, by the pipeline."""
    run = _text_pipeline(exported, function_to_apply="none")
    return [{"value": one["score"]} for one in run([row["text"] for row in rows])]


def _text_pipeline(exported: Exported, **settings: Any) -> Any:
    return transformers.pipeline(
        "text-classification",
        model=exported.model,
        tokenizer=exported.tokenizer,
        batch_size=BATCH_ROWS,
        **settings,
    )


def tags(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The tag of each word's first token, all rows in one padded batch."""
    words = [row["tokens"] for row in rows]
    inputs = exported.tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = exported.model(**inputs).logits.argmax(-1)
    names = exported.model.config.id2label
    out = []
    for i, of_row in enumerate(words):
        place = inputs.word_ids(i)
        out.append([names[int(found[i, place.index(k)])] for k in range(len(of_row))])
    return out


def spans(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The text of the best span of the context, all rows in one padded batch."""
    inputs = exported.tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        padding=True,
        return_tensors="pt",
        return_offsets_mapping=True,
    )
    offsets = inputs.pop("offset_mapping")
    with torch.no_grad():
        outputs = exported.model(**inputs)
    out = []
    for i, row in enumerate(rows):
        context = [k for k, part in enumerate(inputs.sequence_ids(i)) if part == 1]
        pairs = [(a, b) for a in context for b in context if a <= b]
        scores = [float(outputs.start_logits[i, a] + outputs.end_logits[i, b]) for a, b in pairs]
        first, last = pairs[int(np.argmax(scores))]
        out.append(row["context"][offsets[i, first, 0] : offsets[i, last, 1]])
    return out


def continued(exported: Exported, rows: Sequence[Row]) -> Answers:
    """What follows each text, written greedily in one batch padded on the left."""
    texts = [row.get("text", row.get("prompt")) for row in rows]
    inputs = exported.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    return _written(exported, inputs)


def replied(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The assistant's turn after each prompt, through the chat template where there is one."""
    if exported.tokenizer.chat_template is None:
        return continued(exported, rows)
    texts = [
        exported.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    inputs = exported.tokenizer(
        texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )
    return _written(exported, inputs)


def _written(exported: Exported, inputs: Any) -> Answers:
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = exported.model.generate(**inputs, max_new_tokens=COMPLETION_TOKENS, do_sample=False)
    return exported.tokenizer.batch_decode(ids[:, prompt:], skip_special_tokens=True)


def rewarded(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The output for each prompt with its answer, all rows in one padded batch."""
    tokenizer = exported.tokenizer
    ends = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.chat_template is None:
        begins = tokenizer.decode(tokenizer("a")["input_ids"]).partition("a")[0]
        texts = [begins + row["prompt"] + row["completion"] + ends for row in rows]
    else:
        turns = [
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            for row in rows
        ]
        texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in turns]
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return [{"reward": float(one)} for one in exported.model(**inputs).logits[:, 0]]


def translated(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The target of each source, written greedily in one padded batch."""
    inputs = exported.tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = exported.model.generate(**inputs, max_new_tokens=TARGET_TOKENS, do_sample=False)
    texts = exported.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def seen(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The best label and its score, by the pipeline with the exported image processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(exported.folder)
    run = transformers.pipeline(
        "image-classification",
        model=exported.model,
        image_processor=processor,
        batch_size=BATCH_ROWS,
    )
    found = run([Image.open(row["image"]).convert("RGB") for row in rows], top_k=1)
    return [{one["label"]: one["score"]} for (one,) in found]


def heard(exported: Exported, rows: Sequence[Row]) -> Answers:
    """The text of each recording, all in one padded batch; frames of padding say nothing."""
    import soundfile

    extractor = transformers.AutoFeatureExtractor.from_pretrained(exported.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.folder)
    waves = [soundfile.read(row["audio"], dtype="float32")[0] for row in rows]
    inputs = extractor(
        waves, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = exported.model(**inputs).logits.argmax(-1)
    frames = exported.model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
    texts = [tokenizer.decode(one[:n]) for one, n in zip(ids, frames, strict=True)]
    return [" ".join(text.split()) for text in texts]


def _words(row: Row) -> list[str]:
    return row["text"].split()


def _asked(row: Row) -> Row:
    answers = {"text": ["was"], "answer_start": [row["text"].index("was")]}
    return {"question": "how was it", "context": row["text"], "answers": answers}


def _turns(row: Row) -> Row:
    question = {"role": "user", "content": row["text"]}
    return {"messages": [question, {"role": "assistant", "content": f"it was {row['label']}"}]}


def _pair(row: Row) -> Row:
    other = "bad" if row["label"] == "good" else "good"
    return {"prompt": row["text"], "chosen": f" {row['label']}", "rejected": f" {other} again"}


def _scored_pair(row: Row) -> Row:
    """A pair, with the answer to score in predictions."""
    pair = _pair(row)
    return {**pair, "completion": pair["chosen"]}


def _picture(row: Row) -> Row:
    """Noise around a level that follows the label, in a file larger than the model's images."""
    seed = zlib.crc32(row["text"].encode())
    path, rng = row["folder"] / f"{seed}.png", np.random.default_rng(seed)
    level = 160 if row["label"] == "good" else 60
    noise = rng.integers(0, 90, (SIDE + 8, SIDE + 8, 3))
    Image.fromarray((level + noise).astype(np.uint8)).save(path)
    return {"image": str(path), "label": row["label"]}


def _sound(row: Row) -> Row:
    """Tones that spell the label; some are longer than others."""
    said = f"{row['label']} so" if len(row["text"]) % 2 else row["label"]
    path = row["folder"] / f"{said.replace(' ', '-')}.wav"
    path.write_bytes(tiny.tones(said))
    return {"audio": str(path), "text": said}


def _completion(found: Row) -> str:
    return found["completion"]


LM_JOB: Row = {"data": {"max_length_tokens": 240}}
"""Long enough that the evaluation rows make one sequence: none is cut in two."""

CASES: dict[str, Case] = {
    "text classification": Case(
        {"type": "text_classification"},
        lambda r: {"text": r["text"], "label": r["label"]},
        classified,
        lambda found: {found["label"]: found["score"]},
    ),
    "multi-label classification": Case(
        {"type": "multi_label_classification", "labels": ["any", "bad", "good"]},
        lambda r: {"text": r["text"], "labels": [r["label"], "any"]},
        several_labels,
        lambda found: found["scores"],
    ),
    "regression": Case(
        {"type": "text_regression"},
        lambda r: {"text": r["text"], "value": len(r["text"]) / 20},
        numbers,
        lambda found: {"value": found["value"]},
    ),
    "token classification": Case(
        {"type": "token_classification"},
        lambda r: {
            "tokens": _words(r),
            "tags": ["B-X" if word == "was" else "O" for word in _words(r)],
        },
        tags,
        lambda found: found["tags"],
    ),
    "question answering": Case(
        {"type": "question_answering", "max_answer_tokens": 100},
        _asked,
        spans,
        lambda found: found["answer"],
        {"data": {"max_length_tokens": 240}},
    ),
    "causal LM": Case(
        {"type": "causal_lm"}, lambda r: {"text": r["text"]}, continued, _completion, LM_JOB, True
    ),
    "instructions": Case(
        {"type": "causal_lm", "rows": {"type": "instruction"}},
        lambda r: {"prompt": r["text"], "answer": r["label"]},
        replied,
        _completion,
        LM_JOB,
        True,
    ),
    "chat": Case(
        {"type": "causal_lm", "rows": {"type": "chat"}},
        _turns,
        replied,
        _completion,
        LM_JOB,
        True,
    ),
    "preference": Case({"type": "preference"}, _pair, replied, _completion, LM_JOB),
    "reward model": Case(
        {
            "type": "reward_model",
            "center_coefficient": 0.01,
        },  # without it, an output's bias cancels in a pair
        _scored_pair,
        rewarded,
        lambda found: {"reward": found["reward"]},
    ),
    "sequence to sequence": Case(
        {"type": "seq2seq", "max_target_tokens": TARGET_TOKENS},
        lambda r: {"source": r["text"], "target": r["label"]},
        translated,
        lambda found: found["target"],
    ),
    "image classification": Case(
        {"type": "image_classification", "size_pixels": SIDE},
        _picture,
        seen,
        lambda found: {found["label"]: found["score"]},
    ),
    "speech recognition": Case(
        {"type": "speech_recognition"}, _sound, heard, lambda found: found["text"]
    ),
}
