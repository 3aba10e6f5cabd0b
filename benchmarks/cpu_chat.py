"""Supervised fine-tuning on a CPU: the answers of a small model before and after.

A byte-level model is first trained on text for 60 steps (`-c tiny -c pydoc -c cpu`), then fine-tuned for 450 steps on
1,000 conversations (`-c data/chat`). In a conversation, the user names a thing in a sentence and asks what it is. There
are four possible answers, so guessing is right a quarter of the time. About half of the conversations continue with a
second thing. There are 24 things and 12 sentences. In training, each thing appears in 9 of the sentences; in held-out
conversations, it appears in the other 3. The benchmark reports bits per byte of held-out answers, and how many of 100
first answers the model writes exactly as in the data, to the last byte. It uses one thread. Seconds are processor time,
which other work on the machine hardly changes.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dma_lightning import ByteTokenizer, ChatDataModule, LanguageModel, Sampling, generate
from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.tables import cpu_of

BASE_STEPS, STEPS, TRAINING, HELD_OUT, LENGTH, BATCH = 60, 450, 1000, 100, 192, 8
THINGS = {
    "animal": "horse goat otter sparrow lizard donkey",
    "fruit": "apple plum cherry banana grape lemon",
    "tool": "hammer saw chisel wrench drill sickle",
    "instrument": "violin flute drum cello harp trumpet",
}
SENTENCES = (
    "I saw the {} by the river.", "There is one {} on the table.", "My sister drew that {}.", "We found his {} here.",
    "Do you like the {} over there?", "He sold his {} last week.", "One {} was in the box.", "She wrote about that {}.",
    "Yesterday I got my {}.", "They asked for the {}.", "That {} is old.", "Look at this {}.",
)  # fmt: skip
KNOWN = 9  # sentences in which a thing appears in training


def draw(held_out: bool, generator: random.Random) -> dict[str, list[dict[str, str]]]:
    """A conversation about one thing or two."""
    messages = []
    for _ in range(generator.choice([1, 2])):
        kind = generator.choice(list(THINGS))
        thing = generator.choice(THINGS[kind].split())
        own = random.Random(thing).sample(SENTENCES, len(SENTENCES))
        sentence = generator.choice(own[KNOWN:] if held_out else own[:KNOWN])
        messages += [
            {"role": "user", "content": f"{sentence.format(thing)} What is it?"},
            {"role": "assistant", "content": kind},
        ]
    return {"messages": messages}


def write_conversations(folder: Path) -> None:
    """`train.jsonl` and `held-out.jsonl`."""
    generator = random.Random(0)
    for name, count in (("train", TRAINING), ("held-out", HELD_OUT)):
        lines = [json.dumps(draw(name == "held-out", generator)) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def fit(folder: Path, name: str, *options: str) -> tuple[str, float]:
    """Run `fit`; what it prints, and the processor time it takes, in seconds."""
    logger = [f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.logger.init_args.name={name}"]
    command = [sys.executable, "-m", "dma_lightning", "fit", *options, *logger, "--trainer.enable_progress_bar=false"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    before = os.times()
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread).stdout
    after = os.times()
    return told, after.children_user + after.children_system - before.children_user - before.children_system


def right_answers(checkpoint: Path, data: ChatDataModule, conversations: list[Row]) -> int:
    """How many first answers the model writes exactly as in the data, given the question."""
    model = LanguageModel.load_from_checkpoint(checkpoint).eval().model
    right, tokenizer = 0, ByteTokenizer()
    for conversation in conversations:
        question, answer = conversation["messages"][:2]
        (text,) = data.template.texts([question, answer])
        ((start, end),) = text.answers
        prompt, expected = (tokenizer.encode(x) for x in (text.text[:start], text.text[start:end]))
        with torch.inference_mode():
            (found,) = generate(model, torch.tensor([prompt]), len(expected), Sampling(temperature=0))
        right += found.tolist() == expected
    return right


def measure(folder: Path) -> Iterator[Row]:
    """One row before fine-tuning, and one after it."""
    write_conversations(folder)
    files = [f"--data.path={folder}/train.jsonl", f"--data.val_path={folder}/held-out.jsonl"]
    text = ["-c", "tiny", "-c", "pydoc", "-c", "cpu", "--trainer.num_sanity_val_steps=0"]
    _, first = fit(folder, "base", *text, "--trainer.limit_val_batches=1", f"--trainer.max_steps={BASE_STEPS}")
    base = folder / "base/version_0/checkpoints/last.ckpt"
    chat = ["-c", "data/chat", "-c", "cpu", *files, "--data.chat_template=simple", f"--data.sequence_length={LENGTH}"]
    chat += [f"--data.batch_size={BATCH}"]
    told, second = fit(folder, "chat", f"--model.init_from={base}", *chat, f"--trainer.max_steps={STEPS}")
    losses = re.search(r"val/bits_per_byte: ([\d.]+) at start, ([\d.]+) at end", told)
    assert losses is not None
    data = ChatDataModule(f"{folder}/train.jsonl", chat_template="simple", sequence_length=LENGTH)
    held_out = [json.loads(line) for line in (folder / "held-out.jsonl").read_text().splitlines()]
    tuned = folder / "chat/version_0/checkpoints/last.ckpt"
    for name, checkpoint, bits, seconds in (
        ("before", base, losses[1], first),
        ("after", tuned, losses[2], second),
    ):
        right = right_answers(checkpoint, data, held_out)
        figures = {"bits_per_byte": float(bits), "right": right, "asked": len(held_out)}
        yield {"model": name, "processor_seconds": round(seconds, 1), **figures}


def tables(result: Result) -> list[Part]:
    """What the page shows: loss and right answers, before and after."""
    return [
        Table(
            result["answers"],
            f"Answers to held-out questions, before and after fine-tuning ({cpu_of(result)}; one seed); fewer bits and "
            "more right answers are better:",
            ["model", "bits per byte of answers", "right answers", "processor seconds of training"],
            lambda row: [
                row["model"],
                f"{row['bits_per_byte']:.2f}",
                f"{row['right']} of {row['asked']}",
                f"{row['processor_seconds']:.0f}",
            ],
        )
    ]


def main() -> None:
    """Train, measure and write."""
    args = CommandLine(__doc__, "cpu_chat", duration="about three minutes").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record(args.out, {"environment": describe()}, {"answers": measure(Path(folder))}, tables)


if __name__ == "__main__":
    main()
