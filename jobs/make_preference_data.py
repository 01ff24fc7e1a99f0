"""Turn the movie reviews into pairs of answers, for jobs on preferences.

- `preferences`: the right judgment of a review over the wrong one.
- `review_pairs`: a review of someone who liked a film over one of someone who did not.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
QUESTION = "Is this film review positive or negative?\n\n"
REQUEST = "Write a review of a film that you liked."
OTHER = {"positive": "negative", "negative": "positive"}
JUDGED = {"train": 240, "eval": 100}


def main() -> None:
    """Write jobs/data/{preferences,review_pairs}/{train,eval}.jsonl from jobs/data/movie_reviews."""
    for split, count in JUDGED.items():
        with open(DATA / "movie_reviews" / f"{split}.csv", encoding="utf-8", newline="") as source:
            reviews = list(csv.DictReader(source))
        write(DATA / "preferences" / f"{split}.jsonl", judgments(reviews[:count]))
        write(DATA / "review_pairs" / f"{split}.jsonl", pairs(reviews))


def judgments(reviews: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yield a question on each review, with the right answer and the wrong one."""
    for review in reviews:
        yield {
            "prompt": QUESTION + review["text"],
            "chosen": f"The review is {review['label']}.",
            "rejected": f"The review is {OTHER[review['label']]}.",
        }


def pairs(reviews: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yield positive and negative reviews two by two, in their order; each is used once."""
    liked, disliked = (
        [review["text"] for review in reviews if review["label"] == label]
        for label in ("positive", "negative")
    )
    for chosen, rejected in zip(liked, disliked, strict=False):
        yield {"prompt": REQUEST, "chosen": chosen, "rejected": rejected}


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as target:
        for row in rows:
            target.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
