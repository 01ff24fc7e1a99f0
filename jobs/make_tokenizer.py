"""Train a tokenizer on the columns of a JSON-lines file, for models that start from a config.

    python jobs/make_tokenizer.py jobs/data/verses/train.jsonl source,target 4000 jobs/data/verses/tokenizer

Byte-level BPE: any text goes in and comes out unchanged. `<pad>` is 0 and `</s>`, which ends every
text, is 1, as T5's config expects.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def texts(path: Path, columns: list[str]) -> Iterator[str]:
    """Every text of the columns."""
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            row = json.loads(line)
            yield from (row[column] for column in columns)


def main(path: Path, columns: list[str], vocab_size: int, out: Path) -> None:
    """Train on `columns` of `path` and write the tokenizer's folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(path, columns), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(out)


if __name__ == "__main__":
    source, names, size, target = sys.argv[1:]
    main(Path(source), names.split(","), int(size), Path(target))
