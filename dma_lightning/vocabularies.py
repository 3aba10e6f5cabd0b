"""Which tokens a model knows: the ids below its `vocab_size`.

A larger id causes an `IndexError` on a CPU. On a GPU the error comes later and leaves the process unusable.
"""

from torch import Tensor

_MEND = "give the model the vocab_size of its data, or make the data with the model's tokenizer"


def check_vocabulary(data: int, model: int) -> None:
    """Check that a model knows all tokens that its data may have.

    Args:
        data: number of different tokens of the data.
        model: `vocab_size` of the model.

    Raises:
        ValueError: if the data has more tokens than the model knows.
    """
    if data > model:
        raise ValueError(f"data: expected at most the {model} tokens of the model (vocab_size), got {data}; {_MEND}")


def check_tokens(name: str, tokens: Tensor, vocab_size: int, ignored: int = 0) -> None:
    """Check that a model knows some tokens; if they are on a GPU, this waits for it.

    Args:
        name: name of the tokens, for the message.
        tokens: integers of any shape.
        vocab_size: the model's number of tokens.
        ignored: an id that is also allowed.

    Raises:
        ValueError: if the model does not know one.
    """
    unknown = (tokens < 0) | (tokens >= vocab_size)
    if ignored < 0:
        unknown &= tokens != ignored
    if unknown.any():
        found = tokens[unknown][0].item()
        raise ValueError(
            f"{name}: expected tokens below the model's vocab_size = {vocab_size}, none of them negative, got {found}; "
            f"{_MEND}"
        )
