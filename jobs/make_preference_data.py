"""Turn the movie reviews into preferences: the right judgement of a review over the wrong one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
QUESTION = "Is this film review positive or negative?\n\n"
OTHER = {"positive": "negative", "negative": "positive"}


def main() -> None:
    """Write jobs/data/preferences/{train,eval}.jsonl from jobs/data/movie_reviews."""
    (DATA / "preferences").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 240), ("eval", 100)):
        with open(DATA / "movie_reviews" / f"{split}.csv", encoding="utf-8", newline="") as source:
            reviews = list(csv.DictReader(source))[:rows]
        with open(DATA / "preferences" / f"{split}.jsonl", "w", encoding="utf-8") as target:
            for review in reviews:
                pair = {
                    "prompt": QUESTION + review["text"],
                    "chosen": f"The review is {review['label']}.",
                    "rejected": f"The review is {OTHER[review['label']]}.",
                }
                target.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main()
