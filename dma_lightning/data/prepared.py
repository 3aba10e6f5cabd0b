"""Text that `dma-lightning prepare` has turned into shards of tokens, packed into sequences of one length.

N sequence length.
"""

import hashlib
import warnings
from pathlib import Path

from dma_lightning.data.find_files import user_path
from dma_lightning.data.manifests import TOKENIZER, Manifest, read_manifest
from dma_lightning.data.shards import Shard
from dma_lightning.data.text import TokenizedDataModule
from dma_lightning.data.windows import TokenWindows
from dma_lightning.files.reading import sha256, verifies_content
from dma_lightning.tokenizers import ByteTokenizer, DataTokenizer, FileTokenizer


class PreparedDataModule(TokenizedDataModule):
    """Language modeling on a folder of `dma-lightning prepare`, memory-mapped: each batch reads only what it needs.

    Training draws windows of all shards in random order. `test` and `predict` use the validation part. `prepare_data`
    reads all shards once and compares their hashes, unless the environment variable DMA_VERIFY_FILES is 0.

    Args:
        path: the folder.
        sequence_length: tokens in a sequence.
        separate_documents: keep attention and labels within each document of a sequence; otherwise a sequence is plain
            text across documents.
        val_path: another folder, with the same tokenizer and special_tokens, for validation.
        val_fraction: share of each shard, at its end, that is kept for validation, unless val_path is given.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.

    Raises:
        ValueError: if a folder is unfinished or damaged, or has other tokens; in `prepare_data`, if a shard differs
            from what was written; in `setup`, if it is too short.
    """

    file_arguments = ("path", "val_path")

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
        self.path = user_path(path)
        self.manifest = read_manifest(self.path)
        self.tokenizer = _tokenizer(self.path, self.manifest)
        super().__init__(self.manifest.vocab_size, sequence_length, batch_size, num_workers)
        self.save_hyperparameters()
        if val_path is None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.separate_documents, self.val_fraction = separate_documents, val_fraction
        self.val_path = None if val_path is None else user_path(val_path)
        self.val_manifest = self.manifest if self.val_path is None else read_manifest(self.val_path)
        self._is_verified = False
        for folder, manifest in self._folders.items():
            if not manifest.knows_bytes:
                warnings.warn(
                    f"{folder}: bits per byte are not reported, since a folder of version 1 does not know the bytes of "
                    "its tokens; prepare the text again for them",
                    stacklevel=2,
                )

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of a token in the whole folder; None if the bytes of single tokens are unknown."""
        knows_bytes = all(manifest.knows_bytes for manifest in self._folders.values())
        return self.manifest.bytes / self.manifest.tokens if knows_bytes else None

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' hashes, and the sequence length."""
        hashes = [x for shard in self.manifest.shards for x in (shard.tokens_sha256, shard.ends_sha256)]
        return f"{hashlib.sha256(''.join(hashes).encode()).hexdigest()}-{self.sequence_length}"

    @property
    def _folders(self) -> dict[Path, Manifest]:
        return {self.path: self.manifest} | ({} if self.val_path is None else {self.val_path: self.val_manifest})

    def prepare_data(self) -> None:
        """Check that all shards are as they were written. Called on one process per node.

        Raises:
            ValueError: if one is not.
        """
        if verifies_content() and not self._is_verified:
            for folder, manifest in self._folders.items():
                manifest.verify(folder)
            self._is_verified = True

    def setup(self, stage: str) -> None:
        """Find the shards and split them."""
        if self.val_path is None:
            train, val = (_shards(self.path, self.manifest, part, self.val_fraction) for part in ("train", "val"))
        else:
            self._check_val_tokens()
            train, val = _shards(self.path, self.manifest), _shards(self.val_path, self.val_manifest)
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

    def _check_val_tokens(self) -> None:
        """Check that the tokens of the validation folder were made as those for training were.

        Raises:
            ValueError: if they were not.
        """
        ours, theirs = self.manifest, self.val_manifest
        if theirs.tokenizer_sha256 != ours.tokenizer_sha256:
            raise ValueError(
                f"val_path: expected a folder with the tokenizer of {self.path}, got {self.val_path} with another; "
                "prepare it with the same"
            )
        matters = isinstance(self.tokenizer, FileTokenizer) and self.tokenizer.has_special_tokens
        if matters and theirs.special_tokens != ours.special_tokens:
            raise ValueError(
                f"val_path: expected a folder with special_tokens {ours.special_tokens!r}, as {self.path}, got "
                f"{self.val_path} with {theirs.special_tokens!r}; prepare it with --special_tokens "
                f"{ours.special_tokens}"
            )


def _tokenizer(folder: Path, manifest: Manifest) -> DataTokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        ValueError: if it is not the one that made the tokens.
    """
    if manifest.tokenizer_sha256 is None:
        return ByteTokenizer()
    file = folder / TOKENIZER
    tokenizer = FileTokenizer(file, manifest.special_tokens)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise ValueError(f"{file}: expected {manifest.vocab_size} tokens, got {tokenizer.vocab_size}; copy it again")
    if verifies_content() and sha256(file) != manifest.tokenizer_sha256:
        raise ValueError(f"{file}: expected the tokenizer that made the tokens, got another; copy the folder again")
    return tokenizer


def _shards(folder: Path, manifest: Manifest, part: str = "all", val_fraction: float = 0.0) -> list[Shard]:
    """All tokens of a folder, or the training or validation part of each shard."""
    shards = []
    for record in manifest.shards:
        tokens, border = record.tokens, record.tokens - round(record.tokens * val_fraction)
        start, stop = {"all": (0, tokens), "train": (0, border), "val": (border, tokens)}[part]
        file = folder / record.name
        shards.append(
            Shard(
                f"{file}.tokens",
                f"{file}.ends.npy",
                manifest.dtype,
                start,
                stop,
                f"{file}.lengths" if manifest.has_lengths else None,
                record.lengths_dtype,
                byte_tokens=manifest.tokenizer_sha256 is None,
                eos=manifest.eos_token_id is not None,
            )
        )
    return shards
