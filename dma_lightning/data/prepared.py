"""Text that `dma-lightning prepare` has turned into shards of tokens, packed into sequences of one length.

N sequence length.
"""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

from dma_lightning.data.find_files import user_path
from dma_lightning.data.manifests import TOKENIZER, Manifest, read_manifest
from dma_lightning.data.mixtures import EXAMPLE, Mixture, checked_weights
from dma_lightning.data.shards import Shard
from dma_lightning.data.text import TokenizedDataModule
from dma_lightning.data.windows import TokenWindows
from dma_lightning.files.reading import sha256, verifies_content
from dma_lightning.tokenizers import ByteTokenizer, DataTokenizer, FileTokenizer


class PreparedDataModule(TokenizedDataModule):
    """Language modeling on folders of `dma-lightning prepare`, memory-mapped: each batch reads only what it needs.

    Training reads windows of all shards in random order. With several folders, weights set what share of the windows
    comes from each. `test` and `predict` use the validation part. `prepare_data` reads all shards once and compares
    their hashes, unless the environment variable DMA_VERIFY_FILES is 0.

    Args:
        path: the folder; or several folders with weights, such as {web: 0.7, books: 0.3}. All folders need the same
            tokenizer, special_tokens and eos_token_id. Weights are shares of the training sequences. They need not add
            up to 1.
        sequence_length: tokens in a sequence.
        separate_documents: keep attention and labels within each document of a sequence; otherwise a sequence is plain
            text across documents.
        val_path: another folder, with the same tokenizer and special_tokens, for validation.
        val_fraction: share of each shard, at its end, that is kept for validation, unless val_path is given.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.

    Raises:
        ValueError: if a folder is unfinished or damaged, or has other tokens, or if a weight is not positive; in
            `prepare_data`, if a shard differs from what was written; in `setup`, if a folder is too short.
    """

    file_arguments = ("path", "val_path")

    def __init__(
        self,
        path: str | dict[str, float],
        sequence_length: int = 1024,
        separate_documents: bool = True,
        val_path: str | None = None,
        val_fraction: float = 0.01,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        self.weights = _weights(path)
        self.manifests = {folder: read_manifest(folder) for folder in self.weights}
        self.path, self.manifest = next(iter(self.manifests.items()))  # the first, which says what tokens are
        self.tokenizer = _tokenizer(self.path, self.manifest)
        super().__init__(self.manifest.vocab_size, sequence_length, batch_size, num_workers)
        self.save_hyperparameters()
        if val_path is None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.separate_documents, self.val_fraction = separate_documents, val_fraction
        self.val_path = None if val_path is None else user_path(val_path)
        self.val_manifest = self.manifest if self.val_path is None else read_manifest(self.val_path)
        self._mixture: Mixture | None = None
        self._is_verified = False
        self._check_mixed_tokens()
        for folder, manifest in self._folders.items():
            if not manifest.knows_bytes:
                warnings.warn(
                    f"{folder}: bits per byte are not reported, since a folder of version 1 does not say how many "
                    "bytes each token has; to get them, prepare the text again",
                    stacklevel=2,
                )

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of a token in the folders, by weight; None if the bytes of single tokens are unknown."""
        if not all(manifest.knows_bytes for manifest in self._folders.values()):
            return None
        mean = sum(weight * self.manifests[x].bytes / self.manifests[x].tokens for x, weight in self.weights.items())
        return mean / sum(self.weights.values())

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' hashes, with the shares of several folders; and the sequence length."""
        if not self._is_mixed:
            return f"{_digest(self.manifest)}-{self.sequence_length}"
        total = sum(self.weights.values())
        shares = [f"{_digest(self.manifests[x])} {self.weights[x] / total:.9g}" for x in self._by_content]
        return f"{hashlib.sha256(', '.join(shares).encode()).hexdigest()}-{self.sequence_length}"

    @property
    def train_mixture(self) -> Mixture | None:
        return self._mixture

    @property
    def _is_mixed(self) -> bool:
        return isinstance(self.hparams["path"], Mapping)

    @property
    def _by_content(self) -> list[Path]:
        """The folders in an order that depends on their content, not on their names or how they were listed."""
        return sorted(self.manifests, key=lambda folder: (_digest(self.manifests[folder]), self.weights[folder]))

    @property
    def _folders(self) -> dict[Path, Manifest]:
        return self.manifests | ({} if self.val_path is None else {self.val_path: self.val_manifest})

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
        part = "train" if self.val_path is None else "all"
        train = {folder: self._shards(folder, part) for folder in self._by_content}
        if self.val_path is None:
            val = [shard for folder in self._by_content for shard in self._shards(folder, "val")]
        else:
            self._check_val_tokens()
            val = _shards(self.val_path, self.val_manifest)
        windows = {folder: self._windows("training", shards, folder) for folder, shards in train.items()}
        self.train_set = self._windows("training", [shard for shards in train.values() for shard in shards], self.path)
        self.val_set = self.test_set = self._windows("validation", val, self.val_path or self.path)
        if self._is_mixed:
            sizes, weights = [len(x) for x in windows.values()], [self.weights[x] for x in windows]
            self._mixture = Mixture.by_weight([str(x) for x in windows], sizes, weights)

    def _shards(self, folder: Path, part: str) -> list[Shard]:
        return _shards(folder, self.manifests[folder], part, self.val_fraction)

    def _windows(self, part: str, shards: list[Shard], folder: Path) -> TokenWindows:
        """Windows of shards.

        Raises:
            ValueError: if there is none; the message names the part and the folder.
        """
        windows = TokenWindows(shards, self.sequence_length, self.separate_documents)
        if not len(windows):
            longest = max(shard.stop - shard.start for shard in shards)
            raise ValueError(
                f"expected more than sequence_length = {self.sequence_length} tokens in the {part} part of a shard, "
                f"got at most {longest} in {len(shards)} shards at {folder}; give more text or fewer shards, shorten "
                "sequence_length, or change val_fraction or val_path"
            )
        return windows

    def _check_mixed_tokens(self) -> None:
        """Check that the tokens of all folders were made in the same way.

        Raises:
            ValueError: if they were not.
        """
        for folder, manifest in self.manifests.items():
            self._check_same_tokens("path", folder, manifest)
            if manifest.eos_token_id != self.manifest.eos_token_id:
                raise ValueError(
                    f"path: expected folders with eos_token_id {self.manifest.eos_token_id}, as in {self.path}, got "
                    f"{folder} with {manifest.eos_token_id}; prepare it in the same way"
                )
            if manifest.knows_bytes != self.manifest.knows_bytes:
                old = folder if self.manifest.knows_bytes else self.path
                raise ValueError(
                    f"path: expected folders that know the bytes of their tokens, got {old} of version 1; prepare it "
                    "again"
                )

    def _check_val_tokens(self) -> None:
        """Check that the tokens of the validation folder were made in the same way as those for training.

        Raises:
            ValueError: if they were not.
        """
        assert self.val_path is not None
        self._check_same_tokens("val_path", self.val_path, self.val_manifest)

    def _check_same_tokens(self, what: str, folder: Path, manifest: Manifest) -> None:
        ours = self.manifest
        if manifest.tokenizer_sha256 != ours.tokenizer_sha256:
            raise ValueError(
                f"{what}: expected a folder with the tokenizer of {self.path}, got {folder} with another; prepare it "
                "with the same tokenizer"
            )
        matters = isinstance(self.tokenizer, FileTokenizer) and self.tokenizer.has_special_tokens
        if matters and manifest.special_tokens != ours.special_tokens:
            raise ValueError(
                f"{what}: expected a folder with special_tokens {ours.special_tokens!r}, as in {self.path}, got "
                f"{folder} with {manifest.special_tokens!r}; prepare it with --special_tokens {ours.special_tokens}"
            )


def _weights(path: str | Mapping[str, float]) -> dict[Path, float]:
    """The weights of folders; that of one folder does not matter.

    Raises:
        ValueError: if a weight is not positive, or a folder has two.
    """
    if not isinstance(path, Mapping):
        folder = user_path(path)
        if folder.name.startswith("{") and not folder.exists():
            raise ValueError(
                f"path: expected a folder, or folders with weights such as {EXAMPLE}, got {str(path)!r}; put a "
                "space after each colon"
            )
        return {folder: 1.0}
    weights = {user_path(folder): weight for folder, weight in checked_weights(path).items()}
    if len(weights) < len(path):
        raise ValueError(f"path: expected each folder once, got {', '.join(map(repr, path))}; add up its weights")
    return weights


def _digest(manifest: Manifest) -> str:
    """Hash of the hashes of a folder's shards."""
    hashes = [x for shard in manifest.shards for x in (shard.tokens_sha256, shard.ends_sha256)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


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
