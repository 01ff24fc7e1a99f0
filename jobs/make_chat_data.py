"""Turn the movie reviews into chats: the user quotes a review, the assistant judges it in one word."""

from __future__ import annotations

import csv
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
QUESTION = "Is this film review positive or negative? Answer with one word.\n\n"


def main() -> None:
    """Write jobs/data/chat/{train,eval}.jsonl from jobs/data/movie_reviews."""
    (DATA / "chat").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 2000), ("eval", 200)):
        with open(DATA / "movie_reviews" / f"{split}.csv", encoding="utf-8", newline="") as source:
            reviews = list(csv.DictReader(source))[:rows]
        with open(DATA / "chat" / f"{split}.jsonl", "w", encoding="utf-8") as target:
            for review in reviews:
                messages = [
                    {"role": "user", "content": QUESTION + review["text"]},
                    {"role": "assistant", "content": review["label"]},
                ]
                target.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
