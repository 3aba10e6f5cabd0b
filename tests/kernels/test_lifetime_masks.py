"""Lifetimes equal the row-wise definition and the sequential heap, exactly."""

from io import BytesIO

import masks
import pytest
import torch
from matplotlib.image import imread

from dma_kernels import Lifetimes, SegmentSlots, reference_mask
from dma_kernels.ranks import ordered_bits
from dma_kernels.selection.deaths import KeyOrder, top_w_deaths


def make_ranks(ties: bool, length: int) -> torch.Tensor:
    """Ranks `[2, 2, N]`: either one head drifts upwards, or there are only five different values."""
    if ties:
        return torch.randint(0, 5, (2, 2, length)).float() - 2
    ranks = torch.randn(2, 2, length)
    ranks[0, 1] += torch.linspace(0, 5, length)
    return ranks


@pytest.mark.parametrize("case", masks.CASES, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("length", masks.LENGTHS)
def test_top_w_equals_heap_and_definition(length: int, ties: bool, case: masks.Case) -> None:
    ranks, arguments = make_ranks(ties, length), case.arguments(2, length)
    for window in masks.windows(length):
        lifetimes = Lifetimes.top_w(ranks, window, **arguments)
        dense = lifetimes.to_dense()
        assert torch.equal(dense, reference_mask(ranks, window, **arguments))
        assert torch.equal(lifetimes.live_counts(), dense.sum(-1))
        assert dense.sum(-1).max() <= lifetimes.capacity
        for b in range(2):
            row = {k: x[b].tolist() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
            assert torch.equal(dense[b, 0], masks.heap_mask(ordered_bits(ranks)[b, 0].tolist(), window, **row))


def test_worked_example() -> None:
    lifetimes = Lifetimes.top_w(torch.tensor([[[3.0, 1, 2, 5, 0, 4]]]), 2)
    assert lifetimes.birth.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert lifetimes.death.flatten().tolist() == [5, 2, 3, 6, 4, 6]  # key 4 is dead on arrival


@pytest.mark.parametrize("segment", [1, 5, 64, 1000])
def test_deaths_do_not_depend_on_the_segment_length(segment: int) -> None:
    keys = KeyOrder.of(ordered_bits(make_ranks(ties=True, length=257)))
    for window in (1, 7, 100):
        assert torch.equal(top_w_deaths(keys, window, segment), top_w_deaths(keys, window))


@pytest.mark.parametrize("window", [1, 7, 110, 111, 116])
def test_equal_ranks_are_a_sliding_window(window: int) -> None:
    dynamic = Lifetimes.top_w(torch.zeros(1, 1, 111), window)
    sliding = Lifetimes.sliding_window(111, window)
    assert torch.equal(dynamic.to_dense(), sliding.to_dense())
    assert dynamic.capacity == sliding.capacity


def test_causal() -> None:
    assert torch.equal(Lifetimes.causal(63).to_dense()[0, 0], torch.ones(63, 63).tril().bool())


def test_nan_rank_is_kept_and_cast_aside_by_nothing() -> None:
    ranks = torch.randn(1, 1, 50)
    ranks[..., 4] = torch.nan
    assert Lifetimes.top_w(ranks, 1).death[0, 0, 4] == 50


def test_returning_document_id_starts_a_new_document() -> None:
    documents = torch.tensor([[7, 7, 3, 7, 7]])
    dense = Lifetimes.top_w(torch.zeros(1, 1, 5), 5, documents=documents).to_dense()[0, 0]
    assert dense.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_ids_at_padded_positions_are_ignored() -> None:
    documents = torch.tensor([[9, 1, 1, 0, 1, 2]])
    padding = torch.tensor([[True, False, False, True, False, False]])
    dense = Lifetimes.top_w(torch.zeros(1, 1, 6), 6, documents=documents, padding=padding).to_dense()[0, 0]
    assert dense[4].tolist() == [False, True, True, False, True, False]
    assert dense[5].tolist() == [False] * 5 + [True]
    assert not dense[0].any()


def test_changing_later_ranks_leaves_earlier_live_sets_unchanged() -> None:
    ranks = make_ranks(ties=False, length=257)
    before = Lifetimes.top_w(ranks, 20).to_dense()
    for t in (1, 64, 100, 256):
        changed = ranks.clone()
        changed[..., t:] = torch.randn_like(changed[..., t:]) * 9
        after = Lifetimes.top_w(changed, 20).to_dense()
        assert torch.equal(before[..., :t, :], after[..., :t, :])


def test_non_contiguous_ranks() -> None:
    ranks = torch.randn(2, 111, 3).transpose(1, 2)
    expected = Lifetimes.top_w(ranks.contiguous(), 9)
    assert torch.equal(Lifetimes.top_w(ranks, 9).death, expected.death)


def test_empty_batch() -> None:
    assert Lifetimes.top_w(torch.zeros(0, 2, 9), 3).death.shape == (0, 2, 9)


def test_draw_shows_every_block() -> None:
    figure = Lifetimes.sliding_window(50, 20).draw(block_size=16)
    patches = figure.axes[0].patches
    assert len(patches) == 16
    assert {patch.get_edgecolor() for patch in patches} != {patches[0].get_edgecolor()}


GOOD = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": torch.zeros(3, 8)}, r"ranks: expected floating or int64 \[B, G, N\], got torch.float32 \[3, 8\]"),
        ({"ranks": torch.zeros(2, 3, 8, dtype=torch.int32)}, "ranks: expected floating or int64"),
        ({"ranks": torch.zeros(2, 3, 0)}, "sequence length: expected at least 1, got 0"),
        ({"keep_window_size": 0}, "keep_window_size: expected at least 1, got 0"),
        ({"keep_last": -1}, "keep_last: expected at least 0, got -1"),
        ({"sinks": -1}, "sinks: expected at least 0, got -1"),
        ({"documents": torch.zeros(2, 7, dtype=torch.long)}, r"documents: expected shape \[2, 8\]"),
        ({"documents": torch.zeros(2, 8)}, "documents: expected integer ids, got torch.float32"),
        ({"padding": torch.zeros(1, 8, dtype=torch.bool)}, r"padding: expected shape \[2, 8\]"),
        ({"padding": torch.ones(2, 8, dtype=torch.long)}, "attention_mask == 0"),
        ({"padding": torch.zeros(2, 8, dtype=torch.bool, device="meta")}, "on cpu"),
    ],
)
def test_bad_selection(arguments: dict[str, object], message: str) -> None:
    arguments = {"ranks": GOOD, "keep_window_size": 4} | arguments
    with pytest.raises(ValueError, match=message):
        Lifetimes.top_w(**arguments)
    with pytest.raises(ValueError, match=message):
        reference_mask(**arguments)


def by_hand(*intervals: tuple[int, int]) -> Lifetimes:
    """A mask of given intervals, with no guarantee about births."""
    birth, death = torch.tensor(intervals, dtype=torch.int32).T[:, None, None]
    return Lifetimes(birth, death, len(intervals))


def test_union_and_intersection_of_masks_made_by_hand() -> None:
    a, b = by_hand((0, 2), (1, 1), (2, 4), (5, 4)), by_hand((2, 4), (3, 4), (0, 3), (9, 9))
    assert torch.equal((a | b).to_dense(), a.to_dense() | b.to_dense())
    assert torch.equal((a & b).to_dense(), a.to_dense() & b.to_dense())
    assert (a | b).capacity == 4  # not more than there are keys
    assert not (a | b).born_at_position
    assert (Lifetimes.causal(4) | Lifetimes.last(4, 2)).born_at_position


def test_two_intervals_per_key_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"key \(0, 0, 1\) .* two intervals, \[0, 1\) and \[2, 3\)"):
        by_hand((0, 1), (0, 1), (1, 2)) | by_hand((0, 1), (2, 3), (0, 2))


def test_masks_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"masks must agree .* got \[1, 1, 4\] on cpu and \[1, 1, 5\] on cpu"):
        Lifetimes.causal(4) | Lifetimes.causal(5)
    with pytest.raises(ValueError, match="masks must agree"):
        Lifetimes.top_w(torch.zeros(1, 2, 4), 2) & Lifetimes.top_w(torch.zeros(1, 3, 4), 2)
    with pytest.raises(ValueError, match=r"on cpu and .* on meta"):
        Lifetimes.causal(4) & Lifetimes.causal(4, "meta")


def test_documents_and_padding_of_the_constructors() -> None:
    documents, padding = torch.tensor([[1, 1, 1, 2, 2]]), torch.tensor([[True, False, False, False, False]])
    sinks = Lifetimes.sinks(5, 1, documents=documents, padding=padding)
    assert sinks.death.tolist() == [[[0, 3, 2, 5, 4]]]
    assert sinks.capacity == 1
    assert Lifetimes.sliding_window(5, 2, documents=documents).death.tolist() == [[[2, 3, 3, 5, 5]]]
    with pytest.raises(ValueError, match=r"documents: expected shape \[1, 5\]"):
        Lifetimes.causal(5, documents=documents[:, :4])
    with pytest.raises(ValueError, match=r"documents: expected \[B, 5\], got \[5\]"):
        Lifetimes.causal(5, documents=documents[0])
    with pytest.raises(ValueError, match="documents: expected integer ids"):
        Lifetimes.causal(5, documents=documents.float())
    with pytest.raises(ValueError, match="padding: expected bool"):
        Lifetimes.last(5, 2, padding=padding.int())
    with pytest.raises(ValueError, match=r"keep_window_size: expected a whole number, got 2\.5"):
        Lifetimes.top_w(torch.zeros(1, 1, 5), 2.5)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        Lifetimes.sinks(5, 0)


def test_masks_by_hand_are_checked_before_they_are_cut() -> None:
    causal = Lifetimes.causal(8)
    with pytest.raises(ValueError, match="capacity: expected at least 8, the number of keys alive at once, got 3"):
        SegmentSlots.plain(Lifetimes(causal.birth, causal.death, 3), 1, 1)
    with pytest.raises(ValueError, match="born at its own position"):
        SegmentSlots.plain(Lifetimes(causal.birth + 1, causal.death, 8), 1, 1)
    assert SegmentSlots.plain(Lifetimes(causal.birth, causal.death, 8), 1, 1).length == 8


def test_huge_sizes_mean_everything() -> None:
    for mask in (Lifetimes.top_w(torch.randn(1, 1, 9), 2, keep_last=2**31 - 1), Lifetimes.last(9, 2**31 - 1)):
        assert torch.equal(mask.to_dense(), Lifetimes.causal(9).to_dense())


def test_density() -> None:
    assert Lifetimes.causal(9).density().tolist() == [[1.0]]
    assert Lifetimes.sliding_window(4, 1).density().item() == pytest.approx(0.4)


def test_bad_lifetimes() -> None:
    position = torch.arange(4, dtype=torch.int32)[None, None]
    with pytest.raises(ValueError, match="death: expected int32"):
        Lifetimes(position, position.long(), 4)
    with pytest.raises(ValueError, match="one shape"):
        Lifetimes(position, position[..., :3], 4)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        Lifetimes(position, position, 0)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        Lifetimes.sliding_window(4, 0)
    with pytest.raises(ValueError, match="block_size >= 1"):
        Lifetimes.causal(4).draw(block_size=0)


def test_a_mask_shows_itself() -> None:
    mask = Lifetimes.top_w(torch.randn(2, 3, 70), 20)
    assert repr(mask) == "Lifetimes(batch=2, heads=3, length=70, capacity=20, cpu)"
    picture = imread(BytesIO(mask._repr_png_()), format="png")[..., :3]
    pixels = picture.shape[0] // 70
    assert pixels >= 5
    white = torch.from_numpy(picture[::pixels, ::pixels].copy()).min(-1).values > 0.95
    assert (white == ~mask.to_dense()[0, 0]).all()
    assert imread(BytesIO(Lifetimes.causal(5000)._repr_png_()), format="png").shape[:2] == (384, 384)
