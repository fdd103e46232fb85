from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.engine.tensors import pack, unpack

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128,
]  # fmt: skip


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*bits)


def through(tensors: dict[str, torch.Tensor], shift_bytes: int = 0) -> dict[str, torch.Tensor]:
    """Over buffers that begin ``shift_bytes`` into their memory, like what arrives from a network."""
    meta, frames = pack(tensors)
    arrived = [memoryview(bytearray(shift_bytes) + bytearray(frame))[shift_bytes:] for frame in frames]
    return unpack(meta, arrived)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    shift_bytes=st.integers(0, 15),
    seed=st.integers(0, 2**16),
)
def test_any_dense_tensor_comes_back_bit_by_bit(
    dtype: torch.dtype, shape: list[int], shift_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 100).to(dtype)
    back = through({"t": tensor}, shift_bytes)["t"]
    assert same_bits(back, tensor)
    assert back.data_ptr() % dtype.itemsize == 0


def test_order_and_names_are_kept() -> None:
    tensors = {"b.weight": torch.zeros(2), "a": torch.ones(1, dtype=torch.int64), "empty": torch.empty(0, 3)}
    assert list(through(tensors)) == list(tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::2],
        torch.tensor(3.0).expand(2, 2),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.nn.Parameter(torch.ones(3)),
        torch.tensor(float("nan")),
    ],
    ids=["transposed", "strided", "expanded", "conjugated", "parameter", "scalar-nan"],
)
def test_unusual_memory_layouts_are_values_like_others(tensor: torch.Tensor) -> None:
    back = through({"t": tensor})["t"]
    assert same_bits(back, tensor.detach().resolve_conj())
    assert not back.requires_grad


def test_nothing_is_copied_on_the_way() -> None:
    tensor = torch.zeros(1000)
    meta, frames = pack({"t": tensor})
    tensor[0] = 7.0
    back = unpack(meta, frames)["t"]
    assert back[0] == 7.0
    assert back.data_ptr() == tensor.data_ptr()


def test_what_is_not_dense_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"embedding is torch\.sparse_coo"):
        pack({"embedding": torch.eye(2).to_sparse()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3]}, "t: 8 bytes for float32 of shape"),
        ({"dtype": "float64"}, "t: 8 bytes for float64"),
        ({"dtype": "load"}, "'load' is no dtype"),
        ({"dtype": "no_such"}, "'no_such' is no dtype"),
    ],
)
def test_description_that_does_not_fit_its_frame_is_refused(change: dict[str, object], message: str) -> None:
    meta, frames = pack({"t": torch.zeros(2)})
    with pytest.raises(ValueError, match=message):
        unpack([{**meta[0], **change}], frames)


def test_missing_frame_is_refused() -> None:
    meta, _ = pack({"t": torch.zeros(2)})
    with pytest.raises(ValueError, match="1 tensors are described, 0 frames came"):
        unpack(meta, [])
