"""What the last of several processes generates after a prompt is what one process generates."""

import functools
from pathlib import Path

import pytest
import torch
from once import once, shared_folder
from read_prompts import FORMS, PROCESSES, continued, model_of, prompts
from together import run_together

from dma_kernels.context import ContextGroup

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process has found."""
    read_all = functools.partial(run_together, HERE / "read_prompts.py", processes=PROCESSES)
    folder = once(shared_folder(tmp_path_factory), "prompts", read_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_last_process_goes_on_as_one(form: str, padded: bool, found: list[dict]) -> None:
    """43 positions in 4 and in 2 parts."""
    wanted = continued(form, padded)
    for rank, parts in ((3, 4), (3, 2), (1, 2)):
        torch.testing.assert_close(found[rank][form, parts, padded], wanted, rtol=0, atol=1e-10)
    assert found[0][form, 4, padded] is None


def test_tokens_are_those_of_one_process(found: list[dict]) -> None:
    input_ids, padding = prompts()
    wanted = model_of().generate(input_ids, 9, padding=padding)
    assert torch.equal(found[3]["tokens", 4], wanted)
    assert torch.equal(found[1]["tokens", 2], wanted)
    assert found[0]["tokens", 4].shape == found[2]["tokens", 2].shape == (3, 0)


@pytest.mark.parametrize("attention", ["mha", "mla", "nsa"])
def test_attentions_that_need_all_keys_are_refused(attention: str) -> None:
    model = model_of(attention=attention)
    with pytest.raises(ValueError, match="attention: expected dma or swa"):
        model.generate(prompts()[0], 1, context=ContextGroup("", 0, 2))
    assert model.context is None


def test_bad_prompts_and_full_caches_are_refused() -> None:
    context = ContextGroup("", 0, 4)
    with pytest.raises(ValueError, match="input_ids: expected at least 4 positions for 4 processes, got 3"):
        model_of().generate(torch.zeros(1, 3, dtype=torch.int64), 1, context=context)
    with pytest.raises(ValueError, match="full_cache: expected False"):
        model_of().generate(torch.zeros(1, 8, dtype=torch.int64), 1, context=context, full_cache=True)
