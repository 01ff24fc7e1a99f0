"""Text to text by an encoder and a decoder: translation, summarization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.tasks.base import (
    IGNORED,
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Scores,
    SoftTargets,
    Task,
    text_problem,
    token_scores,
)
from orchestrator.tasks.batches import pad, ragged, tokens_and_mask
from orchestrator.tasks.default_lr import BY_SIZE, SEQ2SEQ_NEW, SEQ2SEQ_TUNED, Rate
from orchestrator.tasks.generation import in_step_with_others
from orchestrator.tasks.tokenizing import set_languages

if TYPE_CHECKING:
    import numpy as np
    import torch

ROUGE = ("rouge1", "rouge2", "rougeL")
SHOWN = 5
"""Outputs that an evaluation's record shows beside their references."""


class Seq2Seq(Task):
    """A source text becomes a target text. Evaluation writes the targets itself and compares them."""

    type: Literal["seq2seq"]
    source_column: str = "source"
    """Column with the text that is read."""
    target_column: str = "target"
    """Column with the text that is to be written."""
    prefix: str = ""
    """Put before every source, as T5's `translate English to German: `."""
    source_language: str | None = None
    """Language of the sources, in the code of the tokenizer (`en_XX`, `eng_Latn`, `en`). Required by tokenizers
    that mark texts with it (mBART, NLLB, M2M100), and refused by others."""
    target_language: str | None = None
    """Language of the targets, likewise. Every text that is written begins with it."""
    max_target_tokens: Annotated[int, Field(ge=2)] = 128
    """Longest target in tokens: longer ones are cut, and none longer is written. Sources are cut to
    `data.max_length_tokens`."""
    num_beams: Annotated[int, Field(ge=1), Affects(Effect.PREDICTION)] = 1
    """Beams of the search in evaluations and predictions; 1 is greedy."""
    keep_generation_settings: Annotated[bool, Affects(Effect.MODEL, Effect.PREDICTION)] = False
    """Write with the checkpoint's own settings of length and repetition (`min_length`, `no_repeat_ngram_size`, …).
    By default they are set aside, in the export too: they suit the data that the checkpoint was made for."""
    bleu_tokenize: Annotated[
        Literal["13a", "intl", "zh", "char", "none"], Affects(Effect.PREDICTION)
    ] = "13a"
    """sacrebleu's tokenizer; `zh` for Chinese, `char` for other languages without spaces."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "bleu",
        "chrf",
        *ROUGE,
        "token_accuracy",
        "loss",
    )
    default_metric: ClassVar[str] = "bleu"
    text_is_data: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    has_scores: ClassVar[bool] = True
    soft_targets: ClassVar[SoftTargets | None] = "tokens"
    pipeline_tag: ClassVar[str] = "text2text-generation"
    peft_task: ClassVar[str] = "SEQ_2_SEQ_LM"
    all_logits: ClassVar[bool] = True
    token_features: ClassVar[tuple[str, ...]] = ("input_ids", "label_ids")
    kept_features: ClassVar[tuple[str, ...]] = ("reference",)
    needs_tokenizer: ClassVar[bool] = True
    default_global_batch_size_source: ClassVar[str] = (
        "a start and no more: recipes for translation count tokens instead of rows"
    )
    tuned_lrs: ClassVar[Mapping[str, Rate]] = SEQ2SEQ_TUNED
    new_lrs: ClassVar[BY_SIZE] = SEQ2SEQ_NEW
    sources: ClassVar[Mapping[str, str]] = {
        "max_target_tokens": "as in transformers' examples of translation and summarization",
        "num_beams": "greedy, which is fastest; Vaswani et al., arXiv 1706.03762, 6.1, write with 4 beams",
        "bleu_tokenize": "sacrebleu's default: Post, arXiv 1804.08771",
    }

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.source_column, self.target_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.source_column,)

    def adapt_tokenizer(self, tokenizer: Any, config: Any) -> None:
        set_languages(tokenizer, self.source_language, self.target_language)

    def features(self) -> dict[str, FeatureKind]:
        return {"input_ids": "ints", "label_ids": "ints", "reference": "text"}

    def length(self, row: EncodedRow) -> int:
        return len(row["input_ids"]) + len(row["label_ids"])

    def targets(self, row: Mapping[str, Any]) -> int:
        return len(row["label_ids"])

    def target_length(self, row: EncodedRow) -> int:
        return len(row["label_ids"])

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        return [self._encoded(row, tokenizer, max_length) for row in rows]

    def _encoded(self, row: RawRow, tokenizer: Any, max_length: int) -> EncodedRow | BadRow:
        for column in self.columns:
            if why := text_problem(row.get(column), column):
                return BadRow(why)
        source = _cut(tokenizer, {"text": self.prefix + row[self.source_column]}, max_length)
        target = _target(tokenizer, row[self.target_column], self.max_target_tokens)
        return {
            "input_ids": source[0],
            "label_ids": target[0],
            "reference": row[self.target_column],
            "n_targets": len(target[0]),
            "truncated": int(source[1] or target[1]),
        }

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np

        labels = [
            row["label_ids"] if weight > 0 else np.full(len(row["label_ids"]), IGNORED)
            for row, weight in zip(rows, weights, strict=True)
        ]
        sources = tokens_and_mask([row["input_ids"] for row in rows], pad_id)
        return {**sources, "labels": pad(labels, IGNORED)}

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return _losses(_logits(model, batch), batch["labels"]).sum()

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scores:
        return token_scores(_logits(model, batch), batch["labels"])

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        logits, labels = _logits(model, batch), batch["labels"]
        correct = (logits.argmax(-1) == labels) & (labels != IGNORED)
        return {
            "loss": _losses(logits, labels).double().sum(-1).cpu().numpy(),
            "n_targets": (labels != IGNORED).sum(-1).cpu().numpy(),
            "n_correct": correct.sum(-1).cpu().numpy(),
            "written": ragged(self._write(model, batch).cpu().tolist()),
        }

    def _write(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token ids (rows, longest written) for each source of the batch."""
        ids: torch.Tensor = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_target_tokens,
            num_beams=self.num_beams,
            do_sample=False,
            synced_gpus=in_step_with_others(),
        )
        return ids

    def decode(self, gathered: dict[str, np.ndarray], tokenizer: Any) -> dict[str, np.ndarray]:
        texts = tokenizer.batch_decode(list(gathered["written"]), skip_special_tokens=True)
        return {**gathered, "written": ragged([text.strip() for text in texts])}

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """BLEU and chrF of the whole corpus, 0 to 100 (Post, arXiv 1804.08771; Popović, W15-3049);
        ROUGE, 0 to 1, is by its definition the mean F over rows (Lin, W04-1013)."""
        import sacrebleu

        written, references = list(gathered["written"]), list(gathered["reference"])
        targets = max(int(gathered["n_targets"].sum()), 1)
        bleu = sacrebleu.corpus_bleu(written, [references], tokenize=self.bleu_tokenize)
        pairs = list(zip(references, written, strict=True))
        return {
            "loss": float(gathered["loss"].sum()) / targets,
            "token_accuracy": int(gathered["n_correct"].sum()) / targets,
            "bleu": float(bleu.score),
            "chrf": float(sacrebleu.corpus_chrf(written, [references]).score),
            **_rouge(pairs),
            "examples": [{"reference": a, "written": b} for a, b in pairs[:SHOWN]],
        }

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import torch

        sources = [row[self.source_column] for row in rows]
        inputs = tokenizer(
            [self.prefix + source for source in sources],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            ids = self._write(model, inputs)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            {self.source_column: source, self.target_column: text.strip()}
            for source, text in zip(sources, texts, strict=True)
        ]


def _cut(tokenizer: Any, text: dict[str, str], max_length: int) -> tuple[list[int], bool]:
    """(token ids, whether some were cut off); what frames a text stays whole."""
    whole = tokenizer(**text, truncation=False, verbose=False)["input_ids"]
    if len(whole) <= max_length:
        return list(whole), False
    cut = tokenizer(**text, truncation=True, max_length=max_length)["input_ids"]
    return list(cut), True


def _target(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], bool]:
    """A target as the tokenizer frames it, closed by an end of text where the frame has none."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    named = {"text_target": text}
    if end is None or end in tokenizer(text_target="")["input_ids"]:
        return _cut(tokenizer, named, max_length)
    ids, cut = _cut(tokenizer, named, max_length - 1)
    return [*ids, end], cut


def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs (rows, target tokens, vocabulary) in fp32; the model shifts the labels to the right.

    mBART begins with a row's last label: rows that only fill the batch, and have none, are lent one.
    """
    labels = batch["labels"].clone()
    empty = (labels == IGNORED).all(-1)
    labels[empty, 0] = batch["input_ids"][empty, 0]
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        use_cache=False,
    ).logits
    return logits.float()


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target token (rows, target tokens), 0 for padding."""
    import torch.nn.functional as functional

    flat = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(labels)


def _rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    scores = [scorer.score(reference, written) for reference, written in pairs]
    return {name: sum(s[name].fmeasure for s in scores) / max(len(scores), 1) for name in ROUGE}
