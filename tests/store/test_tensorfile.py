"""What is written and summed in one pass is what the safetensors library reads."""

import errno
import itertools
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import files_of_at_most

from flowray.store import tensorfile
from flowray.store.tensorfile import opened, read_tensors, write_tensors

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


def test_rows_in_several_files_are_one_tensor(tmp_path):
    """Uneven ones, and none in the last file, beside what lies whole in one of them."""
    tensor, scalar = torch.randn(5, 3), torch.tensor(7.0)
    files = [tmp_path / f"x-{place}.safetensors" for place in range(4)]
    write_tensors(files[0], {"rows": tensor[:2]})
    write_tensors(files[1], {"rows": tensor[2:4], "scalar": scalar})
    write_tensors(files[2], {"rows": tensor[4:]})
    write_tensors(files[3], {"whole": tensor})
    read = read_tensors(files)
    assert read.keys() == {"rows", "scalar", "whole"}
    for name, want in (("rows", tensor), ("scalar", scalar), ("whole", tensor)):
        assert torch.equal(read[name], want), name
    with opened(files) as stored:
        assert stored["rows"].shape == stored["whole"].shape == (5, 3)
        assert stored["scalar"].shape == ()
        for begin, end in itertools.combinations_with_replacement(range(6), 2):
            for name in ("rows", "whole"):
                assert torch.equal(stored[name].rows(begin, end), tensor[begin:end])


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
