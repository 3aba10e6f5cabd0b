"""`dma-lightning evaluate`: runs tasks of lm-evaluation-harness on a checkpoint."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from dma_lightning.closest import did_you_mean
from dma_lightning.data.find_files import user_path
from dma_lightning.evaluation import Reader, TrainedRun
from dma_lightning.evaluation.reports import facts, new_file, number, table_head, table_row, write_report
from dma_lightning.tokenizers import SpecialTokens
from dma_lightning.trained_models import saved_tokenizer


def evaluate(
    ckpt_path: Path,
    tasks: list[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    prefix_token_id: int | None = None,
    special_tokens: SpecialTokens | None = None,
    chunk_size: int = 2048,
    device: str | None = None,
    backend: str | None = None,
    full_cache: bool = False,
    output: Path | None = None,
) -> None:
    """Run tasks of lm-evaluation-harness on a text model, and print a table of scores.

    This needs lm-evaluation-harness: pip install 'dma-lightning[eval]'.

    Args:
        ckpt_path: a checkpoint; its tokens are bytes, or those of the tokenizer in it or beside it.
        tasks: names of tasks, groups or tags, or patterns such as 'arc_*'. For several, separate them with commas or
            repeat the option.
        include_path: a folder with YAML files of your own tasks. They can run code, so use only files that you trust.
        num_fewshot: number of solved examples in each context, except in tasks that set 0. Default: as the task says.
        limit: use only the first documents (questions) of each task, at most this many.
        batch_size: sequences read at once.
        max_length: maximum number of tokens that the model reads at once; longer contexts lose their beginning.
            Default: the model's max_position_embeddings.
        prefix_token_id: token to put before a text that has no context. Default: the model's bos_token_id, or else its
            eos_token_id.
        special_tokens: whether the name of a special token in the text stays text (text) or becomes that token (parse).
            Default: as in the training data.
        chunk_size: positions read at once.
        device: where to compute, such as cpu or cuda:1. Default: the GPU if there is one.
        backend: attention backend. Default: the checkpoint's.
        full_cache: keep all keys, for comparison; apart from rounding, the results are the same.
        output: a JSON file to write all results to; it must not exist.
    """
    output, least = new_file(output), {"limit": 1, "batch_size": 1, "max_length": 2, "num_fewshot": 0}
    given = {"limit": limit, "batch_size": batch_size, "max_length": max_length, "num_fewshot": num_fewshot}
    for name, value in given.items():
        if value is not None and value < least[name]:
            raise ValueError(f"{name}: expected at least {least[name]}, got {value}")
    folder = None if include_path is None else user_path(include_path)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"include_path: expected a folder with YAML files of tasks, got {folder}")
    harness = _harness()
    run = TrainedRun.open(ckpt_path, device, backend)
    reader = Reader(run.module.model, run.device, chunk_size, full_cache)
    tokenizer = saved_tokenizer(run.saved, run.module, special_tokens or run.saved.special_tokens)
    lm = harness.HarnessLM.of_model(reader, tokenizer, run.module.model.config, max_length, batch_size, prefix_token_id)
    manager = harness.TaskManager(include_path=folder)
    names = _known_tasks(manager, tasks)
    rows = _rows(harness.scores_of_tasks(lm, manager, names, num_fewshot, limit))
    print(table_head(["task", "filter", "examples in context", "documents", "metric", "value", "± standard error"]))
    for row in rows:
        figures = (number(row["value"]), number(row["standard_error"]))
        about = (row["task"], row["filter"], str(row["num_fewshot"]), f"{row['documents']:,}", row["metric"])
        print(table_row([*about, *figures]))
    if lm.truncated:
        print(f"{lm.truncated:,} contexts lost their beginning: max_length is {lm.max_length:,}", file=sys.stderr)
    if output is not None:
        how = {"batch_size": batch_size, "max_length": lm.max_length, "prefix_token_id": lm.prefix, "limit": limit}
        how |= {"truncated": lm.truncated, "lm_eval": version("lm_eval")}
        write_report(output, facts(run, reader) | how | {"results": rows})


def _harness() -> ModuleType:
    """The module that needs lm-evaluation-harness.

    Raises:
        ValueError: if the harness is not installed.
    """
    try:
        return import_module("dma_lightning.evaluation.harness")
    except ImportError as error:
        raise ValueError(
            f"expected lm-evaluation-harness, version 0.4.13 or newer, got none or an older one ({error}); pip install "
            "'dma-lightning[eval]'"
        ) from error


def _known_tasks(manager: Any, given: Sequence[str]) -> list[str]:
    """Names of the tasks that were asked for, each once.

    Raises:
        ValueError: if a name or pattern matches no task.
    """
    names: dict[str, None] = {}
    for pattern in (name.strip() for text in given or [""] for name in text.split(",")):
        found = manager.match_tasks([pattern]) if pattern else []
        if not found:
            meant = did_you_mean(pattern, manager.all_tasks)
            raise ValueError(
                f"tasks: expected names of tasks, got {pattern!r}"
                f"{meant or '; `lm-eval ls tasks` lists them, and --include_path adds your own'}"
            )
        names |= dict.fromkeys(found)
    return list(names)


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric of each task and group: its value, and what the value depends on."""
    rows = []
    for task, values in (found["results"] | found.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "version": found["versions"].get(task),
                    "filter": kind,
                    "num_fewshot": found["n-shot"].get(task),
                    "documents": values["sample_len"],
                    "metric": metric,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "value": value,
                    "standard_error": error if isinstance(error, float) else None,
                }
            )
    return rows
