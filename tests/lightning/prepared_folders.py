"""A corpus with every kind of file, and what `dma-lightning prepare` makes from it."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import zstandard

from dma_lightning.data.manifests import read_manifest

DOCUMENTS = [f"document {i}: " + "Größe 𝄞 " * (i % 7) + "\nend\n" for i in range(60)]


def write_corpus(folder: Path) -> list[str]:
    """Write files of every kind; their documents in order."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [DOCUMENTS[i : i + 15] for i in range(0, 60, 15)]
    lines = ["".join(json.dumps({"id": 1, "text": text}) + "\n" for text in part).encode() for part in parts]
    (folder / "a.jsonl").write_bytes(lines[0] + b"\n" + json.dumps({"text": ""}).encode() + b"\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1][:50]) + gzip.compress(lines[1][50:]))  # two members
    compress = zstandard.ZstdCompressor().compress
    (folder / "c.ndjson.zst").write_bytes(compress(lines[2][:70]) + compress(lines[2][70:]))  # two frames
    (folder / "d.txt").write_text("".join(parts[3]))
    (folder / "e.txt").write_text("")
    (folder / "f.md.gz").write_bytes(gzip.compress(b"last"))
    (folder / "g.jsonl").write_text("")
    (folder / ".hidden").write_text("hidden")
    return [*DOCUMENTS[:45], "".join(parts[3]), "last"]


def read_back(folder: Path) -> list[bytes]:
    """The documents of a prepared folder of bytes."""
    manifest = read_manifest(folder)
    found = []
    for shard in manifest.shards:
        tokens = np.fromfile(folder / f"{shard.name}.tokens", manifest.dtype)
        ends = np.load(folder / f"{shard.name}.ends.npy")
        assert (len(tokens), len(ends)) == (shard.tokens, shard.documents)
        found += [tokens[a:b].tobytes() for a, b in itertools.pairwise([0, *ends])]
    assert manifest.documents == len(found)
    assert manifest.tokens == manifest.bytes == sum(map(len, found))
    return found


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
