"""Text that `dma-lightning prepare` has made into shards of tokens, packed to sequences of one length.

N sequence length.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from dma_lightning.data.shards import TOKENIZER, Shard, read_manifest
from dma_lightning.data.text import TokenizedDataModule
from dma_lightning.data.windows import TokenWindows
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer


class PreparedDataModule(TokenizedDataModule):
    """Language modelling on a folder of `dma-lightning prepare`, memory-mapped: no more is read than a batch needs.

    Training draws windows of all shards in random order. `test` and `predict` use the validation part.

    Args:
        path: the folder.
        sequence_length: tokens in a sequence.
        separate_documents: let attention and labels stay within each document of a sequence; else a sequence is plain
            text across documents.
        val_path: another folder of the same tokenizer, for validation.
        val_fraction: share of each shard, at its end, that is kept for validation, unless val_path is given.
        batch_size: sequences in a batch of each process.
        num_workers: processes that load data beside each training process.

    Raises:
        ValueError: if a folder is not finished or damaged, or has other tokens; in `setup`, if it is too short.
    """

    def __init__(
        self,
        path: str,
        sequence_length: int = 1024,
        separate_documents: bool = True,
        val_path: str | None = None,
        val_fraction: float = 0.01,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        self.path = Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        self.tokenizer = _tokenizer(self.path, self.manifest)
        super().__init__(self.manifest["vocab_size"], sequence_length, batch_size, num_workers)
        self.save_hyperparameters()
        if val_path is None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.separate_documents, self.val_fraction = separate_documents, val_fraction
        self.val_path = None if val_path is None else Path(val_path).expanduser()

    @property
    def bytes_per_token(self) -> float:
        """Mean length of a token in the whole folder."""
        return self.manifest["bytes"] / self.manifest["tokens"]

    @property
    def val_bytes_per_token(self) -> float:
        return self._val_manifest["bytes"] / self._val_manifest["tokens"]

    @property
    def fingerprint(self) -> str:
        """Hash of the shards', and how long sequences are."""
        hashes = [shard[name] for shard in self.manifest["shards"] for name in ("tokens_sha256", "ends_sha256")]
        return f"{hashlib.sha256(''.join(hashes).encode()).hexdigest()}-{self.sequence_length}"

    @cached_property
    def _val_manifest(self) -> dict[str, Any]:
        return self.manifest if self.val_path is None else read_manifest(self.val_path)

    def setup(self, stage: str) -> None:
        """Find the shards and split them."""
        if self.val_path is None:
            train, val = (_shards(self.path, self.manifest, part, self.val_fraction) for part in ("train", "val"))
        else:
            if self._val_manifest["tokenizer_sha256"] != self.manifest["tokenizer_sha256"]:
                raise ValueError(
                    f"val_path: expected a folder with the tokenizer of {self.path}, got {self.val_path} with another; "
                    "prepare it with the same"
                )
            train, val = _shards(self.path, self.manifest), _shards(self.val_path, self._val_manifest)
        self.train_set = TokenWindows(train, self.sequence_length, self.separate_documents)
        self.val_set = self.test_set = TokenWindows(val, self.sequence_length, self.separate_documents)
        for name, windows, folder in (
            ("training", self.train_set, self.path),
            ("validation", self.val_set, self.val_path or self.path),
        ):
            if not len(windows):
                longest = max(shard.stop - shard.start for shard in windows.shards)
                raise ValueError(
                    f"expected more than sequence_length = {self.sequence_length} tokens in the {name} part of a "
                    f"shard, got at most {longest} in {len(windows.shards)} shards at {folder}; give more text or "
                    "fewer shards, shorten sequence_length, or change val_fraction or val_path"
                )


def _tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a prepared folder."""
    return ByteTokenizer() if manifest["tokenizer_sha256"] is None else FileTokenizer(folder / TOKENIZER)


def _shards(folder: Path, manifest: dict[str, Any], part: str = "all", val_fraction: float = 0.0) -> list[Shard]:
    """All tokens of a folder, or the first or last of each shard."""
    shards = []
    for shard in manifest["shards"]:
        tokens, border = shard["tokens"], shard["tokens"] - round(shard["tokens"] * val_fraction)
        start, stop = {"all": (0, tokens), "train": (0, border), "val": (border, tokens)}[part]
        files = str(folder / f"{shard['name']}.tokens"), str(folder / f"{shard['name']}.ends.npy")
        shards.append(Shard(*files, manifest["dtype"], start, stop))
    return shards
