"""Speak words in Morse code, with noise: audio with its text, as no registry has recorded speech.

    python jobs/fetch.py brown && python jobs/make_morse_data.py

Two words of the Brown corpus per clip; pitch and speed differ from clip to clip.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

DATA = Path(__file__).parent / "data"
RATE_HZ = 4000
CODE = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        [
            ".-",
            "-...",
            "-.-.",
            "-..",
            ".",
            "..-.",
            "--.",
            "....",
            "..",
            ".---",
            "-.-",
            ".-..",
            "--",
            "-.",
            "---",
            ".--.",
            "--.-",
            ".-.",
            "...",
            "-",
            "..-",
            "...-",
            ".--",
            "-..-",
            "-.--",
            "--..",
        ],
        strict=True,
    )
)


def spoken(text: str, rng: random.Random) -> np.ndarray:
    """A tone per dot (one unit) and dash (three), silence between: one unit, three, seven."""
    unit_s, pitch_hz = rng.uniform(0.035, 0.05), rng.uniform(500, 900)
    units: list[int] = [0] * 3
    for word in text.split():
        for letter in word:
            for mark in CODE[letter]:
                units += [1] * (1 if mark == "." else 3) + [0]
            units += [0] * 2
        units += [0] * 4
    on = np.repeat(np.array(units, dtype=np.float64), int(unit_s * RATE_HZ))
    tone = np.sin(2 * np.pi * pitch_hz * np.arange(len(on)) / RATE_HZ)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(size=len(on))
    return 0.5 * on * tone + 0.05 * noise


def main() -> None:
    """Write jobs/data/morse/{train,eval}.parquet with the columns audio (FLAC) and text."""
    (DATA / "morse").mkdir(parents=True, exist_ok=True)
    for split, clips in (("train", 3000), ("eval", 200)):
        rng = random.Random(split)
        lines = (DATA / "brown" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        words = [w.lower() for line in lines for w in json.loads(line)["tokens"]]
        words = [word for word in words if 2 <= len(word) <= 4 and set(word) <= set(CODE)]
        audio, texts = [], []
        for _ in range(clips):
            texts.append(" ".join(rng.sample(words, 2)))
            flac = io.BytesIO()
            soundfile.write(flac, spoken(texts[-1], rng), RATE_HZ, format="FLAC")
            audio.append(flac.getvalue())
        table = pa.table({"audio": audio, "text": texts})
        pq.write_table(table, DATA / "morse" / f"{split}.parquet", row_group_size=500)


if __name__ == "__main__":
    main()
