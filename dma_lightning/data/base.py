"""The base of every data module of token sequences.

B batch, N length.
"""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dma_lightning.data.mixtures import Mixture
from dma_lightning.data.restoring import RestorableDataModule
from dma_lightning.data.samplers import EvalSampler, PaddedDataset, Sequences, TrainSampler
from dma_lightning.files.reading import Count, as_kind

IGNORE_INDEX = -100
POSITION_KEY = "position"  # in a checkpoint's state of the data


class _Position(TypedDict):
    """What a checkpoint says about the position in the training data; older checkpoints say less."""

    epoch: Count
    batches: Count
    batches_trained: Count
    batches_per_epoch: NotRequired[Count]
    seed: Count
    sequences: Count
    fingerprint: NotRequired[str | None]
    processes: Count
    batch_size: Count


class Batch(TypedDict):
    """One batch: what the model reads, and what it must predict at each position.

    `input_ids` and `labels` are int64 `[B, N]`. The label of a position is the token to predict there, or
    `IGNORE_INDEX`. All other keys are optional:

    - `documents` (int64) and `padding` (bool) `[B, N]`.
    - `label_bytes`, int64 `[B]`: how many bytes of source text the labels of each sequence stand for. A token stands
      for the text from the end of the previous token in its document to its own end; an end token stands for none.
    - `is_answer`, bool `[B]`: whether the labels of a sequence are one answer, which is right or wrong as a whole.
    - `length` and `depth`, int64 `[B]`: in an example that asks for a needle, its number of tokens, and the needle's
      place in the haystack in percent.
    """

    input_ids: Tensor
    labels: Tensor
    documents: NotRequired[Tensor]
    padding: NotRequired[Tensor]
    label_bytes: NotRequired[Tensor]
    is_answer: NotRequired[Tensor]
    length: NotRequired[Tensor]
    depth: NotRequired[Tensor]


class SequenceDataModule(RestorableDataModule):
    """Data loaders over datasets of equally long token sequences.

    A subclass sets `train_set`, `val_set` and `test_set` in `setup`.

    `seed_everything` and the epoch alone decide the training order. Checkpoints carry the position in it, and training
    resumes exactly there, whatever `num_workers` is. Validation and test count every sequence once, whatever the
    number of processes.

    Args:
        vocab_size: number of different tokens, passed on to the model.
        sequence_length: tokens in a sequence, passed on to the model.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
    """

    train_set: Sequences
    val_set: Sequences
    test_set: Sequences

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of a token if the data is text, passed on to the model."""
        return None

    @property
    def answer_groups(self) -> Mapping[str, Sequence[int]]:
        """Optional keys of `Batch` by which validation groups answers, with the values of each."""
        return {}

    @property
    def fingerprint(self) -> str | None:
        """What identifies the training data, such as a hash; None if nothing does."""
        return None

    @property
    def train_mixture(self) -> Mixture | None:
        """The share of each source of the training data; None if there is one source. Known after `setup`."""
        return None

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.batch_size, self.num_workers = batch_size, num_workers
        self._train_sampler: TrainSampler | None = None
        self._saved: _Position | None = None  # the position that a checkpoint holds

    def train_dataloader(self) -> DataLoader:
        """Batches of this process, from the current position on.

        Raises:
            ValueError: if a checkpoint from within an epoch has other data, other batches, or another epoch length.
        """
        if not self._batches_trained:
            self._saved = None  # the checkpoint was only inspected; training does not resume from it
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        seed = self._saved["seed"] if self._saved else seed
        position = self._position if self.trainer is not None else None
        order = None if self.train_mixture is None else self.train_mixture.order
        sampler = TrainSampler(len(self.train_set), self.batch_size, *self._processes, seed, position, order)
        self._train_sampler = sampler
        if self._saved and self._saved["batches"]:
            _check_same_batches(self._saved, sampler, self.fingerprint, self._batches_per_epoch)
        # Lightning asks loaders for their state, and does not see that the data module has it.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)  # Lightning splits it among processes and gives writers the indices

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: the position in the training data."""
        sampler = self._train_sampler
        if sampler is None or self.trainer is None:
            return {POSITION_KEY: self._saved} if self._saved else {}
        epoch, batches = self._position()
        position = {"epoch": epoch, "batches": batches, "batches_trained": self._batches_trained}
        position["batches_per_epoch"] = self._batches_per_epoch
        order = {"seed": sampler.seed, "sequences": sampler.count, "fingerprint": self.fingerprint}
        return {POSITION_KEY: position | order | {"processes": sampler.num_replicas, "batch_size": sampler.batch_size}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of a checkpoint; with an older one, at the trainer's count.

        Raises:
            ValueError: if a part of the position is missing or has another type.
        """
        saved = state.get(POSITION_KEY)
        self._saved = as_kind(saved, _Position, f"data {POSITION_KEY}") if saved else None

    @property
    def _processes(self) -> tuple[int, int]:
        """How many processes share the data, and the index of this one; processes that read the same data are one."""
        sharing = self.trainer and self.trainer.distributed_sampler_kwargs
        return (sharing["num_replicas"], sharing["rank"]) if sharing else (1, 0)

    @property
    def _batches_trained(self) -> int:
        """Batches trained on in all epochs; loaders with workers run ahead of it."""
        if self.trainer is None:
            return 0
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed  # type: ignore[attr-defined]  # declared as a class above its own

    @property
    def _batches_per_epoch(self) -> int:
        assert self._train_sampler is not None
        batches, limit = self._train_sampler.batches, 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def _position(self) -> tuple[int, int]:
        """The epoch, and how many of its batches were trained on."""
        done, saved = self._batches_trained, self._saved
        if saved:  # earlier epochs may have had another number of batches
            done += saved["epoch"] * self._batches_per_epoch + saved["batches"] - saved["batches_trained"]
        return divmod(done, max(1, self._batches_per_epoch))

    def _eval_loader(self, dataset: Sequences) -> DataLoader:
        return self._loader(PaddedDataset(dataset, IGNORE_INDEX), EvalSampler(len(dataset), *self._processes))

    def _loader(self, dataset: Sequences, sampler: Sampler | None = None) -> DataLoader:
        return DataLoader(
            cast("Dataset[dict[str, Any]]", dataset),  # torch accepts anything with a length and items
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # the global one belongs to the model
            worker_init_fn=_begin_worker,
        )


def _begin_worker(worker: int) -> None:
    """Ignore preemption and Ctrl+C in a worker: the training process needs it until it has saved, and then ends it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent.pid:
        os._exit(1)  # torch ends a worker whose parent is killed, but not before the worker has started
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _check_same_batches(
    saved: _Position, sampler: TrainSampler, fingerprint: str | None, batches_per_epoch: int
) -> None:
    """Check that a position within an epoch still means the same.

    Raises:
        ValueError: if it has another meaning now.
    """
    processes, size = saved["processes"], saved["batch_size"]
    if processes * size != sampler.global_batch:
        raise ValueError(
            f"the checkpoint was made within an epoch: expected as many sequences per step as before, {processes} "
            f"processes x batch_size {size}, got {sampler.num_replicas} x {sampler.batch_size}; change either so that "
            f"the product is {processes * size}, or resume from a checkpoint at the end of an epoch"
        )
    if saved["sequences"] != sampler.count:
        raise ValueError(
            f"the checkpoint was made within an epoch: expected its {saved['sequences']} training sequences, got "
            f"{sampler.count}; give the same data, or resume from a checkpoint at the end of an epoch"
        )
    if saved.get("fingerprint") not in (None, fingerprint):
        raise ValueError(
            f"the checkpoint was made within an epoch: expected its training data ({saved['fingerprint']}), got other "
            f"data ({fingerprint}); give the same data (and data.special_tokens), or resume from a checkpoint at the "
            "end of an epoch"
        )
    if saved.get("batches_per_epoch") not in (None, batches_per_epoch):
        raise ValueError(
            f"the checkpoint was made within an epoch: expected its {saved['batches_per_epoch']} batches, got "
            f"{batches_per_epoch}; give the same trainer.limit_train_batches, or resume from a checkpoint at the end "
            "of an epoch"
        )
