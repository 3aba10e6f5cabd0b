"""Our models for lm-evaluation-harness, which the extra `eval` installs."""

import random
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dma_lightning.config import ModelConfig
from dma_lightning.evaluation.continuations import Continuing, Pair, continued_texts, likelihoods
from dma_lightning.evaluation.reading import Reader
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import Tokenizer
from dma_lightning.vocabularies import check_tokens

__all__ = ["HarnessLM", "TaskManager", "scores_of_tasks"]

_NEW_TOKENS = 256  # at most, in a continuation, unless the task sets another number; the harness's default
_SEED = 1234  # for choosing examples and sampling tokens; the harness's default
_FILTERS = ("top_k", "top_p", "min_p")
_KNOWN = {"do_sample", "temperature", "repetition_penalty", "max_gen_toks", "until", *_FILTERS}


class HarnessLM(TemplateLM):
    """One of our models, with the interface that lm-evaluation-harness calls.

    Contexts and continuations are tokenized as in the harness's own class for Transformers models, but no special
    tokens are added, because our training adds none either.

    Args:
        reader: reads sequences.
        tokenizer: the model's.
        max_length: maximum number of tokens that the model reads at once, at least 2. Longer contexts lose their
            beginning.
        batch_size: sequences read at once.
        prefix_token_id: token to put before a text that has no context. Default: none; such texts are then an error.
        end_tokens: tokens that end a text.

    Attributes:
        truncated: number of contexts that lost their beginning so far.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        max_length: int,
        batch_size: int = 16,
        prefix_token_id: int | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if max_length < 2 or batch_size < 1:
            raise ValueError(f"expected max_length >= 2 and batch_size >= 1, got {max_length} and {batch_size}")
        self.reader, self.text_tokenizer = reader, tokenizer  # `tokenizer` would be one of Transformers
        self.max_length, self.batch_size = max_length, batch_size
        self.prefix, self.end_tokens = prefix_token_id, tuple(end_tokens)
        self.truncated = 0

    @classmethod
    def of_model(
        cls,
        reader: Reader,
        tokenizer: Tokenizer,
        config: ModelConfig,
        max_length: int | None = None,
        batch_size: int = 16,
        prefix_token_id: int | None = None,
    ) -> Self:
        """A model with the maximum length and the tokens of its configuration, unless others are given.

        Raises:
            ValueError: if a number is out of range.
        """
        ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
        firsts = [token for token in (prefix_token_id, config.bos_token_id, *ends) if token is not None]
        check_tokens("prefix_token_id", torch.tensor(firsts[:1], dtype=torch.int64), config.vocab_size)
        longest = config.max_position_embeddings if max_length is None else max_length
        return cls(reader, tokenizer, longest, batch_size, next(iter(firsts), None), ends)

    @property
    def eot_token_id(self) -> int | None:
        """The first token that ends a text."""
        return next(iter(self.end_tokens), None)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context.

        Raises:
            ValueError: if there is none.
        """
        if self.prefix is None:
            raise ValueError(
                "prefix_token_id: expected a token to read before texts without context, got none, and the model has "
                "no bos_token_id or eos_token_id; set one, such as 10 (a line break) for a byte-level model"
            )
        return self.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; special tokens are never added."""
        return self.text_tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        for request in requests:
            _, continuation = request.args
            if not self.tok_encode(continuation):
                raise ValueError(
                    f"task {request.task_name}: expected continuations of at least one token, got {continuation!r}; "
                    "remove that document from the task"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in found]
            windows += [(("", ""), *pair) for pair in pairs]
            owners += [number] * len(pairs)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[Continuing, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._continuing(request), []).append(number)
        found: dict[int, str] = {}
        for how, numbers in groups.items():
            prompts = [self._prompt(requests[number].args[0], how.max_new_tokens) for number in numbers]
            texts = continued_texts(self.reader, self.text_tokenizer, prompts, how, self.batch_size)
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._pair(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        return [(score.nats, score.greedy) for score in likelihoods(self.reader, pairs, self.batch_size)]

    def _pair(self, context: list[int], continuation: list[int]) -> Pair:
        """A pair that the model can read at once.

        Raises:
            ValueError: if the continuation has no tokens, or alone is too long.
        """
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(
                f"expected continuations of 1 to max_length = {self.max_length} tokens, got {len(continuation)}; "
                "raise --max_length if it is too long, or remove the document from its task"
            )
        return Pair(tuple(self._end(context, self.max_length + 1 - len(continuation))), tuple(continuation))

    def _prompt(self, text: str, max_new_tokens: int) -> list[int]:
        """The last tokens of a context that leave room for new ones."""
        return self._end(self.tok_encode(text) or [self.prefix_token_id], self.max_length - max_new_tokens)

    def _end(self, context: list[int], count: int) -> list[int]:
        """The last tokens of a context."""
        self.truncated += len(context) > count
        return context[-count:]

    def _continuing(self, request: Instance) -> Continuing:
        """How a task asks for its contexts to be continued.

        Raises:
            ValueError: if it sets an option that we do not support, or asks for more tokens than the model reads.
        """
        asked = normalize_gen_kwargs(request.args[1], _NEW_TOKENS)
        if strange := sorted(asked.keys() - _KNOWN):
            raise ValueError(
                f"task {request.task_name}: expected generation_kwargs among {sorted(_KNOWN)}, got {strange}; remove "
                "them from the task"
            )
        count = asked["max_gen_toks"]
        if not 1 <= count < self.max_length:
            raise ValueError(
                f"task {request.task_name}: expected 1 to {self.max_length - 1} new tokens (max_gen_toks), below "
                f"max_length, got {count}; raise --max_length, which may exceed the training length"
            )
        temperature = asked.get("temperature", 1.0) if asked["do_sample"] else 0.0
        filters = {name: asked[name] for name in _FILTERS if name in asked and temperature > 0}
        sampling = Sampling(asked.get("repetition_penalty", 1.0), temperature, **filters)
        until = asked.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        return Continuing(count, sampling, tuple(filter(None, stop)), self.end_tokens)


def scores_of_tasks(
    lm: HarnessLM, manager: TaskManager, names: Sequence[str], num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The scores that the harness's `simple_evaluate` reports, without what it collects about git and the environment.

    Args:
        lm: the model.
        manager: knows the tasks.
        names: names of tasks, groups and tags.
        num_fewshot: number of solved examples in each context, except in tasks that set 0. Default: as the task says.
        limit: maximum number of documents of each task.
    """
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=_SEED)
    found: dict[str, Any] = evaluate(lm, loaded, limit=limit, log_samples=False)
    return found
