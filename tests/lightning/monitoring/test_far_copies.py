"""Labels that can be copied only from beyond the window: against brute force, and their loss in a callback."""

import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from test_monitoring import documented, events, fit, tags, values
from torch import Tensor

from dma_lightning.data import IGNORE_INDEX
from dma_lightning.monitoring import FarCopyMonitor
from dma_lightning.monitoring.far_copies import far_copies

SECTION = "What only a memory can copy"


def brute_force(
    input_ids: Tensor, window: int, documents: Tensor | None, padding: Tensor | None, order: int
) -> list[list[bool]]:
    """Far copies by the definition, position by position."""

    def gram(row: int, t: int) -> tuple[int, ...] | None:
        places = range(t - order + 1, t + 1)
        if t < order - 1 or (padding is not None and padding[row, places[0] : t + 1].any()):
            return None
        if documents is not None and len(set(documents[row, places[0] : t + 1].tolist())) > 1:
            return None
        return tuple(input_ids[row, places[0] : t + 1].tolist())

    def same_document(row: int, s: int, t: int) -> bool:
        if documents is None:
            return True
        real = documents[row, s : t + 1]
        if padding is not None:  # whose ids say nothing
            real = real[~padding[row, s : t + 1]]
        return len(set(real.tolist())) == 1

    found = []
    for row in range(len(input_ids)):
        grams = [gram(row, t) for t in range(input_ids.shape[1])]
        earlier = [
            [t - s for s in range(t) if x is not None and grams[s] == x and same_document(row, s, t)]
            for t, x in enumerate(grams)
        ]
        found.append([bool(distances) and min(distances) > window for distances in earlier])
    return found


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 111, 257])
@pytest.mark.parametrize("kind", ["", "documents", "padding", "documents and padding"])
def test_far_copies_by_brute_force(order: int, length: int, kind: str) -> None:
    input_ids = torch.randint(-1, 2, (3, length)) * 2**40  # few tokens, so that n-grams recur; any integers
    documents = (torch.arange(length) * 3 // length).expand(3, -1) % 2 if "documents" in kind else None
    padding = torch.rand(3, length) < 0.03 if "padding" in kind else None
    some = 0
    for window in (1, 7, 20, length - 1 or 1, length + 5):
        found = far_copies(input_ids, window, documents, padding, order)
        assert found.tolist() == brute_force(input_ids, window, documents, padding, order)
        some += found.sum().item()
    assert some or length == 1 or order == 1


def test_a_window_just_reaches_what_followed() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 9, 8, 7, 6, 1, 2, 3, 4]])  # position 11 asks for the 9 of position 4
    assert far_copies(tokens, 7).nonzero().tolist() == [[0, 11]]  # sees positions 5 to 11
    assert not far_copies(tokens, 8).any()  # sees position 4, too
    again = torch.cat([tokens, tokens[:, -4:]], 1)
    assert far_copies(again, 3).nonzero().tolist() == [[0, 11], [0, 15]]
    assert far_copies(again, 7).nonzero().tolist() == [[0, 11]]  # the last one is near by now


def test_rows_and_documents_do_not_share() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert far_copies(tokens, 1).nonzero().tolist() == [[0, 8]]
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    assert not far_copies(tokens, 1, documents).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"order": 0}, "order: expected at least 1, got 0"),
        ({"input_ids": torch.zeros(3)}, r"input_ids: expected integers \[B, N\], got torch.float32 \[3\]"),
        ({"documents": torch.zeros(1, 4, dtype=torch.long)}, "documents: expected shape"),
    ],
)
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        far_copies(**{"input_ids": torch.zeros(1, 9, dtype=torch.long), "window": 2} | change)


def run_monitor(monitor: FarCopyMonitor, batches: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, float]:
    """What the callback logs for batches with the given token losses."""
    logged: dict[str, float] = {}
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda figures, **_: logged.update(figures))
    monitor.on_validation_epoch_start(None, module)
    for i, (batch, losses) in enumerate(batches):
        monitor.on_validation_batch_end(None, module, {"token_losses": losses}, batch, i)
    monitor.on_validation_epoch_end(None, module)
    return {name: float(x) for name, x in logged.items()}


def test_figures_are_means_over_labels() -> None:
    batches, nats, copies, labels = [], 0.0, 0, 0
    for _ in range(3):
        batch = {"input_ids": torch.randint(0, 3, (2, 63)), "labels": torch.randint(0, 3, (2, 63))}
        batch["labels"][torch.rand(2, 63) < 0.3] = IGNORE_INDEX
        losses = torch.rand(2, 63)
        far = far_copies(batch["input_ids"], 9) & (batch["labels"] != IGNORE_INDEX)
        nats, copies = nats + losses[far].sum().item(), copies + far.sum().item()
        labels += (batch["labels"] != IGNORE_INDEX).sum().item()
        batches.append((batch, losses))
    monitor = FarCopyMonitor(9)
    for _ in range(2):  # a validation forgets the one before
        assert run_monitor(monitor, batches) == pytest.approx(
            {"val/far_copy_loss": nats / copies, "val/far_copy_share": copies / labels}
        )
    none = run_monitor(FarCopyMonitor(63), batches)
    assert math.isnan(none["val/far_copy_loss"])
    assert none["val/far_copy_share"] == 0


def test_a_module_that_returns_no_losses() -> None:
    with pytest.raises(ValueError, match=r"expected LightningModule\.validation_step to return `token_losses`"):
        FarCopyMonitor(9).on_validation_batch_end(None, pl.LightningModule(), None, {}, 0)


def test_documented_figures_and_no_other(tmp_path: Path) -> None:
    """With an n-gram of one token and no window to speak of, which most labels are."""
    monitor = ["--trainer.callbacks+=dma_lightning.monitoring.FarCopyMonitor", "--trainer.callbacks.window=1"]
    (tmp_path / "with").mkdir()
    cli = fit(tmp_path / "with", *monitor, "--trainer.callbacks.order=1")
    read = events(tmp_path / "with")
    (tmp_path / "without").mkdir()
    fit(tmp_path / "without")
    assert tags(read) - tags(events(tmp_path / "without")) == documented(SECTION)
    assert [x.step for x in read.Scalars("val/far_copy_loss")] == [x.step for x in read.Scalars("val/loss")]
    batches = [x for _, x in zip(range(2), cli.datamodule.val_dataloader(), strict=False)]
    copies = [far_copies(x["input_ids"], 1, x.get("documents"), x.get("padding"), 1) for x in batches]
    labels = [x["labels"] != IGNORE_INDEX for x in batches]
    share = sum((x & y).sum() for x, y in zip(copies, labels, strict=True)) / sum(x.sum() for x in labels)
    assert values(read, "val/far_copy_share") == pytest.approx([share.item()] * 2)
    with torch.no_grad():
        losses = [cli.model._scores(x).losses for x in batches]
    far = torch.cat([loss[x & y] for loss, x, y in zip(losses, copies, labels, strict=True)])
    assert values(read, "val/far_copy_loss")[-1] == pytest.approx(far.mean().item(), rel=1e-4)
