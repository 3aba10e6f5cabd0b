"""Needles in a haystack of text: recall the code of a word, wherever it was given.

    BOS sentences … The code of <word> is <6 digits>. … sentences The code of <word> is <6 digits>      labels: digits .

Bytes are tokens. In validation and test only the answer has labels: the first digit under the last space of the
question, and each further byte under the previous one. In training every byte has a label, and most examples are plain
text.

L tokens of an example, padded to N sequence length.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dma_lightning.data.base import IGNORE_INDEX, Sequences
from dma_lightning.data.drawn import seeded
from dma_lightning.data.needles import HaystackDataModule, HaystackTask, NeedleExamples
from dma_lightning.data.shards import Shard
from dma_lightning.data.text import TextDataModule
from dma_lightning.tokenizers import ByteTokenizer

BOS, PAD = 256, 257

_ALL_WORDS = """
    anchor apple arrow autumn badge balcony barn basket beacon beetle blanket border bottle branch bridge bronze bucket
    butter button cabin camel candle canyon carpet castle cellar chalk cherry circle clover coffee comet copper corner
    cotton cradle crystal curtain desert dolphin donkey dragon eagle ember engine falcon feather fiddle finger flower
    forest fountain garden garlic ginger glacier gravel hammer harbor harvest helmet honey island ivory jacket jungle
    kettle kitten ladder lantern lemon lizard magnet maple marble market meadow melon mirror morning mountain needle
    nutmeg ocean olive onion orchard oyster paddle palace parrot pebble pepper pillow planet pocket puzzle quarry rabbit
    raven ribbon river rocket saddle sailor salmon shadow silver spider spring stable summer sunset tablet temple
    thunder timber tunnel turtle valley velvet violin walnut whistle willow window winter zebra
"""
WORDS = tuple(_ALL_WORDS.split())
HELD_OUT_WORDS = WORDS[::4]
"""Words of validation and test."""
TRAINING_WORDS = tuple(word for word in WORDS if word not in HELD_OUT_WORDS)

_QUESTION, _ANSWER = "The code of {word} is ", "{code:06d}."
_CODES = 10**6
_ANSWER_LENGTH = 7  # bytes
_SENTENCE_END = re.compile(rb"[.!?][\"')\]]*\s+")  # includes the space that follows
_WORD_END = re.compile(rb"\s+")
_LOOK_BACK, _LONGEST_WORD = 4096, 64  # bytes
_MOST_OFF = 0.05  # share of a haystack that a needle may move to reach the end of a sentence or word


@dataclass(frozen=True)
class TextNeedles:
    """Settings of the examples.

    Attributes:
        sequence_length: N, maximum number of tokens in an example.
        words: words for needles.
        max_needles: maximum number of needles in an example, each with a different word.
        needle_fraction: share of examples with needles; the others are N tokens of text.
        label_text: whether every byte has a label, or only those of the answer.

    Raises:
        ValueError: if such an example does not exist.
    """

    sequence_length: int
    words: tuple[str, ...]
    max_needles: int = 1
    needle_fraction: float = 1.0
    label_text: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.needle_fraction <= 1:
            raise ValueError(f"needle_fraction: expected a share from 0 to 1, got {self.needle_fraction}")
        if not 1 <= self.max_needles <= len(self.words):
            raise ValueError(
                f"max_needles: expected from 1 to {len(self.words)}, a word for each, got {self.max_needles}"
            )
        if self.sequence_length < self.least_length:
            raise ValueError(
                f"sequence_length: expected at least {self.least_length} for a question and up to {self.max_needles} "
                f"needles, got {self.sequence_length}; raise it or lower max_needles"
            )

    @property
    def vocab_size(self) -> int:
        """V, number of different tokens."""
        return 258

    @property
    def pad_token(self) -> int:
        """Token of the padding."""
        return PAD

    @property
    def least_length(self) -> int:
        """Tokens of the shortest example that has room for the longest words."""
        told = len(_QUESTION.format(word=max(self.words, key=len))) + _ANSWER_LENGTH
        return told + self.max_needles * (told + 1)


@dataclass(frozen=True)
class TextNeedleTask:
    """The generator of examples.

    Attributes:
        needles: settings of the examples.
        text: bytes of the haystacks, at least N.
    """

    needles: TextNeedles
    text: Shard

    @property
    def vocab_size(self) -> int:
        """V, number of different tokens."""
        return self.needles.vocab_size

    @property
    def sequence_length(self) -> int:
        """N, maximum number of tokens in an example."""
        return self.needles.sequence_length

    @property
    def least_length(self) -> int:
        """Tokens of the shortest example that has room for the longest words."""
        return self.needles.least_length

    @property
    def pad_token(self) -> int:
        """Token of the padding."""
        return self.needles.pad_token

    @property
    def chance(self) -> float:
        """Share of whole answers that a guess among all codes gets right."""
        return 1 / _CODES

    def generate(
        self, seed: int, length: int | None = None, depth: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw an example: first whether it has needles, then length, depth, words, codes, other depths, text.

        Args:
            seed: seed for everything that is drawn.
            length: L. Default: N for plain text; otherwise drawn, from N / 8 or `least_length`, whichever is more, up
                to N.
            depth: where the needle in question stands in the haystack, from 0, at the beginning, to 100, just before
                the question (and before other needles at the same place). The needle moves to the nearest end of a
                sentence, or of a word if the sentence's is more than 5 percent of the haystack away. Default: drawn.

        Returns:
            Inputs and labels, int64 `[L]`.
        """
        random = seeded(seed)
        has_needles = random.random_sample() < self.needles.needle_fraction
        if has_needles:
            text = self._question(random, length, depth)
        else:
            text = self._passage(random, self.sequence_length if length is None else length)
        tokens = np.concatenate([[BOS], np.frombuffer(text, np.uint8)]).astype(np.int64)
        inputs, labels = tokens[:-1], tokens[1:].copy()
        if has_needles and not self.needles.label_text:
            labels[:-_ANSWER_LENGTH] = IGNORE_INDEX
        return inputs, labels

    def _question(self, random: np.random.RandomState, length: int | None, depth: float | None) -> bytes:
        """A haystack with needles, a question about the first needle drawn, and the answer."""
        if length is None:
            length = random.randint(max(self.least_length, self.sequence_length // 8), self.sequence_length + 1)
        depth = 100 * random.random_sample() if depth is None else depth
        count = random.randint(1, self.needles.max_needles + 1)
        questions = [_QUESTION.format(word=word) for word in random.choice(self.needles.words, count, replace=False)]
        answers = [_ANSWER.format(code=code) for code in random.randint(_CODES, size=count)]
        needles = [f"{question}{answer} ".encode() for question, answer in zip(questions, answers, strict=True)]
        asked = f"{questions[0]}{answers[0]}".encode()
        depths = [depth, *(100 * random.random_sample(count - 1))]
        hay = self._passage(random, length - len(asked) - sum(map(len, needles)))
        ends = _sentence_ends(hay)
        places = [_place(hay, ends, x) for x in depths]
        parts, done = [], 0
        for i in np.argsort(places, kind="stable"):
            parts += [hay[done : places[i]], needles[i]]
            done = places[i]
        return b"".join([*parts, hay[done:], asked])

    def _passage(self, random: np.random.RandomState, size: int) -> bytes:
        """Text that begins with a sentence, or anywhere if no sentence ends in a long stretch before."""
        place = random.randint(self.text.stop - self.text.start - size + 1)
        first = max(0, place - _LOOK_BACK)
        ends = _sentence_ends(self.text.tokens[first:place].tobytes())
        start = first + ends[-1] if ends else place if first else 0
        return self.text.tokens[start : start + size].tobytes()


class MixedExamples(NeedleExamples):
    """Training examples, plain text and needles; their labels are bytes of text, not answers."""

    def draw(self, index: int) -> dict[str, Tensor]:
        item = super().draw(index)
        label_bytes = (item["labels"] != IGNORE_INDEX).sum()
        return item | {"is_answer": torch.zeros((), dtype=torch.bool), "label_bytes": label_bytes}


class TextNeedleDataModule(HaystackDataModule):
    """Needles (sentences with a code) in a haystack of text, byte by byte; validation and test use new words.

    A share of the training examples has 1 to max_needles needles at any depth, and a question about one of them. The
    length of such an example is from an eighth of sequence_length up to all of it. The others are plain text.
    Validation and test examples have one needle. They cover depths of 0, 10, ..., 100 percent at a quarter, a half and
    all of sequence_length. Text is read and cached as in `TextDataModule`.

    Args:
        path: a file, a folder (all files below it that are not hidden) or a glob. Default: the English help topics
            that come with every Python (`pydoc_data.topics`).
        sequence_length: maximum number of tokens in an example; shorter examples are padded.
        needle_fraction: share of training examples with needles.
        max_needles: maximum number of needles in a training example.
        val_path: another text, for validation and test.
        val_fraction: share of the text, at its end, that is kept for validation and test, unless val_path is given.
        train_examples: number of training examples.
        val_examples: number of validation examples; every 33 cover each depth at each length once.
        test_examples: number of test examples, also used by `predict`.
        seed: seed of the data set; data sets of equal sizes with different seeds share no examples.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
        cache_dir: folder of the cached text. Default: `dma-lightning` in the user's cache folder.

    Raises:
        ValueError: if a size or share is out of range; in `prepare_data` or `setup`, if a path holds no text, or if
            the text is too short or changes during reading.
    """

    needles: TextNeedles

    file_arguments = ("path", "val_path", "cache_dir")
    task_arguments = ("sequence_length", "needle_fraction", "max_needles")

    def __init__(
        self,
        path: str | None = None,
        sequence_length: int = 1024,
        needle_fraction: float = 0.2,
        max_needles: int = 4,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        train_examples: int = 1_000_000,
        val_examples: int = 990,
        test_examples: int = 990,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        self.mixture = TextNeedles(sequence_length, TRAINING_WORDS, max_needles, needle_fraction, label_text=True)
        self.needles = TextNeedles(sequence_length, HELD_OUT_WORDS)
        self.tokenizer = ByteTokenizer()  # used by pictures and samples
        super().__init__(self.needles, (train_examples, val_examples, test_examples), seed, batch_size, num_workers)
        self.save_hyperparameters()
        self.text = _text(path, cache_dir, val_fraction)
        self.val_text = None if val_path is None else _text(val_path, cache_dir, val_fraction)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of a token."""
        return 1.0

    @property
    def fingerprint(self) -> str:
        """Everything that determines the training examples."""
        text = self._training_text
        return f"{super().fingerprint}, {text.stop} bytes of {Path(text.tokens_file).stem}"

    def prepare_data(self) -> None:
        """Write the arrays of the texts, unless they are there and complete. Called on one process per node."""
        for text in (self.text, self.val_text):
            if text is not None:
                text.prepare_data()

    def examples(self, split: int, first_seed: int, count: int) -> Sequences:
        if split > 0:
            return NeedleExamples(self._asking(self.needles), first_seed, count, grid=True)
        text = self._training_text
        _check_size(text, self.sequence_length, "training")
        return MixedExamples(TextNeedleTask(self.mixture, text), first_seed, count, grid=False)

    def task_at(self, length: int) -> HaystackTask:
        return self._asking(replace(self.needles, sequence_length=length))

    def _asking(self, needles: TextNeedles) -> TextNeedleTask:
        """The generator of validation and test examples."""
        text = self.text.part("val") if self.val_text is None else self.val_text.part("all")
        _check_size(text, needles.sequence_length, "validation")
        return TextNeedleTask(needles, text)

    @property
    def _training_text(self) -> Shard:
        return self.text.part("train" if self.val_text is None else "all")


def _text(path: str | None, cache_dir: str | None, val_fraction: float) -> TextDataModule:
    """The reader of a text. Within `__init__` above, it would save the arguments of both classes as its own."""
    return TextDataModule(path, val_fraction=val_fraction, cache_dir=cache_dir)


def _check_size(text: Shard, length: int, name: str) -> None:
    """Check that a text is long enough for examples of a length.

    Raises:
        ValueError: if it is too short.
    """
    if (size := text.stop - text.start) < length:
        raise ValueError(
            f"expected at least {length} bytes of {name} text for examples of {length} tokens, got {size}; give more "
            "text, ask for shorter examples, or change val_fraction or val_path"
        )


def _sentence_ends(text: bytes) -> list[int]:
    """Where sentences end, after the space that follows."""
    return [end.end() for end in _SENTENCE_END.finditer(text)]


def _place(hay: bytes, ends: Sequence[int], depth: float) -> int:
    """Where the needle of a depth stands in a haystack; `ends` are the ends of its sentences."""
    asked, most = round(depth / 100 * len(hay)), _MOST_OFF * len(hay)
    sentence = min((0, *ends, len(hay)), key=lambda end: abs(end - asked))
    words = (word.end() for word in _WORD_END.finditer(hay, max(0, asked - _LONGEST_WORD), asked + _LONGEST_WORD))
    word = min(words, key=lambda end: abs(end - asked), default=asked)
    return sentence if abs(sentence - asked) <= most else word
