"""What is written and summed in one pass is what the safetensors library reads."""

import errno
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import files_of_at_most

from flowray.store import tensorfile
from flowray.store.tensorfile import write_tensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def test_the_library_reads_every_type_and_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "BLOCK", 64)  # several blocks a tensor
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randint(
            0, 2 if dtype is torch.bool else 100, (7, 5), generator=generator
        ).to(dtype)
        for dtype in DTYPES
    }
    wide = torch.randn(40, 30, generator=generator)
    tensors |= {
        "step": torch.tensor(7.0),
        "none": torch.empty(0, 3),
        "turned": wide.T,
        "every other": wide[:, ::2],
        'a "name" in ünicode': wide[0],
        "trained": torch.nn.Parameter(wide[1]),
    }
    file = tmp_path / "x.safetensors"
    told = write_tensors(file, tensors)
    content = file.read_bytes()
    assert told == {"size": len(content), "crc32": zlib.crc32(content)}
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor.detach()), name
    begins = int.from_bytes(content[:8], "little") + 8
    assert begins % 8 == 0
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == tensors.keys()


def test_no_tensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


def test_a_full_disk_is_the_systems_error(tmp_path):
    with files_of_at_most(1000), pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1000)})
    assert caught.value.errno == errno.EFBIG
    full = Path("/dev/full")
    link = tmp_path / "y.safetensors"
    link.symlink_to(full)
    with pytest.raises(FileExistsError):  # a new file, never through a link that lies there
        write_tensors(link, {"a": torch.zeros(8)})
