"""Kernel configurations: the fastest ones in a file are used, and nothing is measured at run time."""

import json
import os
from pathlib import Path

import pytest
import torch

from dma_kernels.attention import configs as kernel_configs
from dma_kernels.attention.configs import BUILTIN, KernelConfig, kernel_config, read_table, tuned_file

pytest.importorskip("triton")
from dma_kernels.tune import cases, mark_fastest

GPU = torch.device("cuda", 0)
ROWS = [
    {"kernel": "forward", "element_bytes": 2, "head_dim": 128, "config": [64, 32, 4, 3, None], "ms": 2.0},
    {"kernel": "forward", "element_bytes": 2, "head_dim": 128, "config": [32, 32, 8, 2, 168], "ms": 1.0},
    {"kernel": "forward", "element_bytes": 2, "head_dim": 128, "config": [128, 64, 8, 3], "error": "does not fit"},
]


@pytest.fixture(autouse=True)
def _no_table_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_configs, "_table", kernel_configs._table.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU-1 (80 GB)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DMA_KERNEL_CONFIGS", raising=False)


def write(path: Path) -> Path:
    rows = [dict(row) for row in ROWS]
    mark_fastest(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": "Some GPU", "rows": rows}))
    return path


def test_every_kernel_has_a_configuration() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for block_d in (16, 32, 64, 128, 256):
            for kernel in ("forward", "query gradients", "key gradients"):
                assert isinstance(kernel_config(kernel, torch.empty(1, dtype=dtype), block_d), KernelConfig)


def test_few_are_measured_and_the_built_in_ones_are_among_them() -> None:
    tried = {(case.kernel, case.element_bytes, case.head_dim): [] for case in cases()}
    for case in cases():
        tried[case[:3]].append(case.config)
    assert tried.keys() == BUILTIN.keys()
    for where, configs in tried.items():
        assert 2 <= len(configs) <= 12
        assert BUILTIN[where] in configs


def test_the_table_of_this_kind_of_gpu_is_found() -> None:
    assert kernel_configs._table(GPU) == BUILTIN
    path = write(tuned_file("Some GPU-1 (80 GB)"))
    assert path.name == "Some_GPU_1_80_GB_.json"
    fastest = {("forward", 2, 128): KernelConfig(32, 32, 8, 2, 168)}
    assert kernel_configs._table(GPU) == BUILTIN | fastest
    assert kernel_configs._table(torch.device("cpu")) == BUILTIN


def test_a_table_can_be_pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tuned_file("Some GPU-1 (80 GB)"))
    monkeypatch.setenv("DMA_KERNEL_CONFIGS", "builtin")
    assert kernel_configs._table(GPU) == BUILTIN
    monkeypatch.setenv("DMA_KERNEL_CONFIGS", str(write(tmp_path / "pinned.json")))
    assert kernel_configs._table(GPU)["forward", 2, 128] == KernelConfig(32, 32, 8, 2, 168)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"rows": 3}',
        '{"rows": [3]}',
        '{"rows": []}',
        '{"rows": [{"kernel": "forward", "element_bytes": 2, "head_dim": 64, "config": [64, 64, 9, 2], "fastest": 1}]}',
        '{"rows": [{"kernel": "forward", "element_bytes": 2, "head_dim": 64, "config": [64, 64, 4, 9], "fastest": 1}]}',
        '{"rows": [{"fastest": true}]}',
        "[" * 100_000,
        "\ufffe",
        '{"rows": [{"kernel": "forward", "element_bytes": 2, "head_dim": 99, "config": [64, 64, 4, 2], "fastest": 1}]}',
        '{"rows": [{"kernel": "forward", "element_bytes": 2, "head_dim": 64, "config": [65, 64, 4, 2], "fastest": 1}]}',
        None,
    ],
)
def test_a_broken_table_is_an_error_that_says_what_to_do(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json: expected a table of kernel configurations.*dma_kernels\.tune"):
        read_table(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": [64, 64, 4, 2, 9]}, r"config: registers: expected one of \[None, 32, .* 248\], got '9'"),
        ({"config": [64, 64, 4, 2, 168.0]}, r"config: registers: expected .* got '168\.0'"),
        ({"config": [64.0, 64, 4, 2]}, r"config: rows: expected .* got '64\.0'"),
        ({"config": [64, 64, True, 2]}, r"config: warps: expected .* got 'True'"),
        ({"config": [64, 64, 4]}, r"config: expected a list of .*'stages', 'registers'\), got \[64, 64, 4\]"),
        ({"config": {}}, "config: expected a list"),
        ({"config": [[], 64, 4, 2]}, "config: rows: expected"),
        ({"kernel": ["forward"]}, "kernel: expected one of"),
        ({"kernel": None}, "kernel: expected one of"),
        ({"element_bytes": 2.0}, r"element_bytes: expected one of \[2, 4\], got '2\.0'"),
        ({"head_dim": "x" * 1000}, r"head_dim: expected one of .*, got 'x{99}'"),
    ],
)
def test_a_broken_row_says_which_field(changed: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [ROWS[1], ROWS[0] | changed | {"fastest": True}]}))
    with pytest.raises(ValueError, match=r"table\.json: expected a table .*: rows\[1\]\." + message) as told:
        read_table(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ValueError, match=r"table\.json: expected a table .* not a regular file"):
        read_table(path)


def test_a_table_without_registers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [ROWS[0] | {"config": [64, 32, 4, 3], "fastest": True}]}))
    assert read_table(path) == {("forward", 2, 128): KernelConfig(64, 32, 4, 3, None)}
