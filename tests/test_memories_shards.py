"""Shards: any heads of any chunk come back, whatever number of ranks wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from memlong_vllm.memories import shards
from memlong_vllm.memories.errors import ShardError
from memlong_vllm.memories.shard_layout import read_header
from memlong_vllm.memories.shards import ShardReader, shard_files, write_shard

TAU, DIM = 4, 6


def random_kv(num_chunks: int, num_heads: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_chunks * 31 + num_heads)
    return torch.randn(num_chunks, 2, num_heads, TAU, DIM, generator=generator).to(dtype)


def write_by_ranks(path: str, kv: torch.Tensor, num_ranks: int) -> None:
    """As tensor-parallel ranks would: with more ranks than heads, heads are replicated."""
    total = kv.shape[2]
    per_rank = max(1, total // num_ranks)
    for rank in range(num_ranks):
        first = rank * total // num_ranks
        write_shard(path, rank, num_ranks, first, kv[:, :, first : first + per_rank])


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), total=st.sampled_from([1, 2, 4, 8]), written=st.sampled_from([1, 2, 4, 8]), rows=st.integers(1, 5)
)
def test_any_heads_written_under_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, total: int, written: int, rows: int
) -> None:
    path = str(tmp_path_factory.mktemp("shard") / "a[b]*")
    kv = random_kv(rows, total, data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])))
    write_by_ranks(path, kv, written)
    row = data.draw(st.integers(0, rows - 1))
    first = data.draw(st.integers(0, total - 1))
    num = data.draw(st.integers(1, total - first))
    got = ShardReader().read(path, row, first, num)
    assert got.dtype == kv.dtype
    assert got.is_contiguous()
    assert torch.equal(got, kv[row, :, first : first + num])


def test_only_the_files_used_last_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 3)
    monkeypatch.setattr(shards, "MAX_KNOWN_SHARDS", 2)
    kvs = {str(tmp_path / f"s{i}"): random_kv(i + 1, 2) for i in range(6)}
    for path, kv in kvs.items():
        write_by_ranks(path, kv, 2)
    reader = ShardReader()
    for _ in range(2):
        for path, kv in kvs.items():
            assert torch.equal(reader.read(path, len(kv) - 1, 0, 2), kv[-1])
            assert len(reader._open) <= 3
            assert len(reader._parts) <= 2


def test_a_non_contiguous_tensor_is_written_as_it_looks(tmp_path: Path) -> None:
    kv = random_kv(3, 4).permute(2, 1, 0, 3, 4)
    write_shard(str(tmp_path / "s"), 0, 1, 0, kv)
    assert torch.equal(ShardReader().read(str(tmp_path / "s"), 2, 1, 2), kv[2, :, 1:3])


def test_nothing_but_the_shard_is_left_in_the_folder(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "s"), 0, 1, 0, random_kv(1, 1))
    assert [file.name for file in tmp_path.iterdir()] == ["s.rank0of1.safetensors"]
    assert read_header(shard_files(str(tmp_path / "s"), 1)[0]).shape == (1, 2, 1, TAU, DIM)


@pytest.mark.parametrize("shape", [(2, 1, TAU, DIM), (1, 3, 1, TAU, DIM), (0, 2, 1, TAU, DIM)])
def test_other_shapes_are_not_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShardError, match=r"s\.rank0of1"):
        write_shard(str(tmp_path / "s"), 0, 1, 0, torch.zeros(shape))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_a_shard_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"gone/s\.rank0of1"):
        write_shard(str(tmp_path / "gone" / "s"), 0, 1, 0, random_kv(1, 1))


@pytest.mark.parametrize(("row", "first", "num"), [(2, 0, 1), (-1, 0, 1), (0, 3, 2), (0, 4, 1), (0, -1, 2), (0, 0, 0)])
def test_rows_and_heads_that_are_not_there(tmp_path: Path, row: int, first: int, num: int) -> None:
    write_by_ranks(str(tmp_path / "s"), random_kv(2, 4), 2)
    with pytest.raises(ShardError, match=r"/s"):
        ShardReader().read(str(tmp_path / "s"), row, first, num)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(ShardError, match=r"/s: 0 files"):
        ShardReader().read(path, 0, 0, 1)
    write_by_ranks(path, random_kv(1, 2), 2)
    Path(shard_files(path, 2)[1]).unlink()
    with pytest.raises(ShardError, match=r"s\.rank1of2\.safetensors"):
        ShardReader().read(path, 0, 0, 1)


KV = {"kv": torch.zeros(1, 2, 1, TAU, DIM)}
HEADS = {"first_head": "0", "num_heads": "1"}
FOREIGN = [
    ({"other": KV["kv"]}, HEADS),
    (KV | {"more": torch.zeros(1)}, HEADS),
    ({"kv": torch.zeros(2, 2)}, HEADS),
    (KV, {}),
    (KV, HEADS | {"first_head": "-1"}),
    (KV, HEADS | {"first_head": "1" * 50}),
    (KV, HEADS | {"num_heads": "2"}),
]


@pytest.mark.parametrize(("tensors", "metadata"), FOREIGN)
def test_files_of_something_else(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    (file,) = shard_files(str(tmp_path / "s"), 1)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ShardError, match=r"s\.rank0of1\.safetensors"):
        ShardReader().read(str(tmp_path / "s"), 0, 0, 1)
    with pytest.raises(ShardError, match=r"s\.rank0of1\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_files_cut_short(tmp_path: Path, kept: int) -> None:
    write_shard(str(tmp_path / "s"), 0, 1, 0, random_kv(2, 2))
    (file,) = (Path(name) for name in shard_files(str(tmp_path / "s"), 1))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ShardError, match=r"s\.rank0of1\.safetensors"):
        ShardReader().read(str(tmp_path / "s"), 0, 0, 1)
