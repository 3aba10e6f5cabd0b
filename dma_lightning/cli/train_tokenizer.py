"""`dma-lightning train-tokenizer`: trains a byte-level BPE tokenizer on text."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dma_lightning.data.find_files import text_files, user_path
from dma_lightning.data.text_formats import check_separator, read_documents
from dma_lightning.files.atomic import atomic_write

_BYTES = 256


def train_tokenizer(
    path: str,
    vocab_size: int = 4096,
    output: Path = Path("tokenizer.json"),
    text_field: str = "text",
    end_token: str = "<|end|>",  # not a password
    separator: str | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on text, for `prepare`, `--data.tokenizer` and other readers of tokenizer.json.

    The same text gives the same file. The tokenizer can encode any text, because each byte has a token. Token 0 is the
    end token; `prepare --eos_token_id 0` ends documents with it.

    Args:
        path: a file, a folder or a glob of what `prepare` reads.
        vocab_size: number of tokens, including the 256 bytes and the end token.
        output: the file to write; it must not exist.
        text_field: the field of a JSONL line, or the column, that holds the text.
        end_token: name of the end token.
        separator: text between the documents of a plain text file, which the tokenizer does not see.

    Raises:
        ValueError: if the vocabulary is too small, the file exists, or there is no text.
    """
    output = user_path(output)
    if vocab_size <= _BYTES:
        raise ValueError(
            f"vocab_size: expected at least {_BYTES + 1}, for all bytes and the end token, got {vocab_size}"
        )
    if not end_token:
        raise ValueError("end_token: expected at least one character, got none")
    if output.exists():
        raise ValueError(f"output: expected no such file, since nothing is overwritten, got {output}; name another")
    files = text_files(path)
    check_separator(separator, files)
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for file in files:
            for piece in read_documents(file, text_field, separator=separator):
                size += piece.bytes
                yield piece.text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if not size:
        raise ValueError(f"path: expected text, got {len(files)} files without any")
    with atomic_write(output) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    found = tokenizer.get_vocab_size()
    fewer = f", because the text yields no more than {found}" if found < vocab_size else ""
    print(f"{output}: {found:,} tokens{fewer}, of {size:,} bytes of text; token 0 is {end_token}")
