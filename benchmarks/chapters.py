"""Cut a corpus of parallel translations into what is evaluated, its other translations, and the rest.

    python benchmarks/chapters.py bible.jsonl.zst --out data/chapters

Documents are chapters, their ids `translation/chapter`. Written are `evaluated.jsonl`, documents drawn
by a hash of their id; `same.jsonl`, all other translations of their chapters; and `rest.jsonl`. A
database of `same` and `rest` holds what a retriever should find, one of `rest` alone does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

from retro_data.corpus import Document, open_reader
from retro_data.pipeline import Settings

log = logging.getLogger("chapters")


def documents_of(path: Path) -> list[Document]:
    settings = Settings.create(root=path.parent, corpus={"name": "chapters", "path": str(path)})
    reader = open_reader(settings.corpora[0])
    records = (r for file in reader.files() for r in reader.records(file.name))
    return [record for record in records if isinstance(record, Document)]


def chapter_of(document: Document) -> str:
    return document.id.partition("/")[2]


def is_drawn(document: Document, share: float) -> bool:
    digest = hashlib.blake2b(document.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--share", type=float, default=0.05, help="of the documents, to be evaluated"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    documents = documents_of(options.corpus)
    drawn = {d.id for d in documents if is_drawn(d, options.share)}
    chapters = {chapter_of(d) for d in documents if d.id in drawn}
    parts: dict[str, list[Document]] = {"evaluated": [], "same": [], "rest": []}
    for document in documents:
        known = "same" if chapter_of(document) in chapters else "rest"
        parts["evaluated" if document.id in drawn else known].append(document)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        path = options.out / f"{name}.jsonl"
        lines = (json.dumps({"id": d.id, "text": d.text}) + "\n" for d in part)
        path.write_text("".join(lines), "utf-8")
        log.info("%s: %d documents", path, len(part))


if __name__ == "__main__":
    main()
