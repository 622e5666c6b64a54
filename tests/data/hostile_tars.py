"""Hostile and odd tars, members, indexes, manifests and names of shards."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hostile import (
    OTHER,
    PICTURE,
    TEXT,
    B,
    Case,
    Write,
    changed,
    header,
    members,
    npy,
    objects,
    of_kind,
    pax,
    pickled,
    put,
    sample,
    tar,
    tar_of,
)

TWO = tar_of([*sample(), *B])
LONG = "x" * 300


def base256(value: int) -> bytes:
    """A size field as GNU writes numbers that octal digits cannot hold."""
    return (b"\xff" if value < 0 else b"\x80") + value.to_bytes(11, "big", signed=True)


def named(size: bytes, count: int = 1, kind: bytes = b"L") -> bytes:
    """`count` headers of a long name, whose sizes are this, before a good tar."""
    one = bytearray(tarfile.TarInfo("././@LongLink").tobuf(tarfile.GNU_FORMAT))
    header(one, 0, {124: size, 156: kind})
    name = b"b.txt".ljust(512, b"\0")
    return (bytes(one) + name) * count + TWO


def overlapping() -> bytes:
    """A size in a pax header that hides b from who believes the ustar header."""
    return tar_of([*sample(), (pax("c.bin", size="2048"), b""), *B], tarfile.PAX_FORMAT)


def sparse() -> bytes:
    """b.txt as GNU tar stores files with holes: 4 bytes at 1 GiB."""
    one = bytearray(tarfile.TarInfo("b.txt").tobuf(tarfile.GNU_FORMAT))
    holes = b"%011o\0%011o\0" % (1 << 30, 4)
    header(one, 0, {124: b"%011o\0" % 4, 156: b"S", 386: holes, 483: b"%011o\0" % ((1 << 30) + 4)})
    return tar_of(sample())[:2048] + bytes(one) + b"text".ljust(512, b"\0") + bytes(1024)


def endings(count: int) -> bytes:
    """Names whose number comes after a dot, so that each is an extension of its own."""
    return tar_of([(f"{i}.{i}", b"") for i in range(count)])


def zipped(size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("a.npy", npy(f"({size},)", dtype="|u1") + bytes(size))
    return buffer.getvalue()


def torch_like(runs: object) -> bytes:
    """A checkpoint as torch.save writes it, without torch."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(runs, protocol=2))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def special(make: Callable[[Path], None], spec: str = "{}") -> Write:
    """A good tar, and what this makes in the folder."""

    def write(folder: Path) -> str:
        put(folder, TWO)
        make(folder)
        return spec

    return write


ARCHIVES = [
    Case("0 bytes beside a good shard", special(lambda f: (f / "0.tar").touch())),
    Case("0 bytes alone", tar(b"")),
    Case("zeros alone", tar(bytes(10240))),
    Case("text called .tar", tar(b"404: not found\n" * 100)),
    Case("a zip called .tar", tar(lambda: zipped(100))),
    Case("a gzipped tar called .tar", tar(lambda: gzip.compress(TWO))),
    Case("a bzipped tar called .tar", tar(lambda: bz2.compress(TWO))),
    Case("an xz tar called .tar", tar(lambda: lzma.compress(TWO))),
    Case("what begins as zstd does", tar(b"\x28\xb5\x2f\xfd" + bytes(1020))),
    Case("gzipped zeros, 2 GiB in 2 MB", tar(lambda: gzip.compress(bytes(1 << 20)) * 2048)),
    Case("cut off in the first header", tar(TWO[:300])),
    Case("cut off in a later header", tar(TWO[:2300])),
    Case("cut off in a picture", tar(TWO[:2600])),
    Case("cut off after a member, no end blocks", tar(TWO[:4096])),
    Case("one block of zeros at the end, not two", tar(TWO[:4608])),
    Case("garbage between members", tar(TWO[:2048] + b"\xa5" * 512 + TWO[2048:])),
    Case("another tar after the end blocks", tar(TWO + tar_of(sample("c")))),
    Case("another tar after 2 MB of zeros", tar(TWO + bytes(2 << 20) + tar_of(sample("c")))),
    Case("the same tar twice in one file", tar(TWO + TWO)),
    Case("garbage after the end blocks", tar(TWO + b"\xa5" * 512)),
    Case("1,500 members twice", tar(lambda: tar_of([(f"{i}.txt", b"a") for i in range(1500)] * 2))),
    Case("a header with a wrong sum", changed(lambda d: header(d, 2048, {0: b"c"}, False))),
    Case("a size that is no number", changed(lambda d: header(d, 2048, {124: b"zz"}))),
    Case("a size beyond the end", changed(lambda d: header(d, 2048, {124: b"77777777777"}))),
    Case("a size below 0", changed(lambda d: header(d, 2048, {124: base256(-1024)}))),
    Case("a size that leads back", changed(lambda d: header(d, 2048, {124: base256(-2560)}))),
    Case("a size of 2^80", changed(lambda d: header(d, 2048, {124: base256(1 << 80)}))),
    Case("a size in base 256", changed(lambda d: header(d, 2048, {124: base256(len(OTHER))}))),
    Case("a long name of 2^62 bytes", tar(lambda: named(base256(1 << 62)))),
    Case("a long name of 8 GiB", tar(lambda: named(b"77777777777\0"))),
    Case("a pax header of 2^70 bytes", tar(lambda: named(base256(1 << 70), kind=b"x"))),
    Case("5,000 long names in a row", tar(lambda: named(b"00000000006\0", 5000))),
    Case("a pax size that hides members", tar(overlapping)),
    Case(
        "a pax size that leads back",
        members((pax("LICENSE", size="-1536"), b""), *B, form=tarfile.PAX_FORMAT),
    ),
    Case(
        "a pax size below 0",
        members((pax("c.bin", size="-4096"), b""), *B, form=tarfile.PAX_FORMAT),
    ),
    Case("a sparse member of 1 GiB", tar(sparse)),
    Case(
        "v7's form",
        changed(lambda d: [header(d, at, {257: bytes(255)}) for at in (0, 1024, 2048, 3072)]),
    ),
    Case("20,000 extensions", tar(lambda: endings(20_000))),
]

NAMES = [
    Case("names of 300 characters", members(*sample(LONG, OTHER))),
    Case("names of 300 characters by pax", members(*sample(LONG, OTHER), form=tarfile.PAX_FORMAT)),
    Case("an absolute name", members(*sample("/tmp/flowray-escaped/b", OTHER))),
    Case("names with ..", members(*sample("../../b", OTHER))),
    Case("names that begin with ./", members(*sample("./b", OTHER))),
    Case("names that are not UTF-8", members(*sample("caf\udce9", OTHER))),
    Case(
        "a pax path that is not UTF-8",
        members(*sample("caf\udce9", OTHER), form=tarfile.PAX_FORMAT),
    ),
    Case(
        "composed and decomposed letters",
        members(*sample("\u00e9", OTHER), *sample("e\u0301", OTHER)),
    ),
    Case("a name with a line feed", members(*sample("b\nc", OTHER))),
    Case(
        "a name with NUL",
        members(
            (pax("b", path="b\0.png"), OTHER),
            (pax("b", path="b\0.txt"), TEXT.encode()),
            form=tarfile.PAX_FORMAT,
        ),
    ),
    Case("names with escapes for terminals", members(*sample("b\x1b[2Jc", OTHER))),
    Case("a name of spaces", members(*sample(" ", OTHER))),
    Case("extensions in capitals", members(("b.PNG", OTHER), ("b.TXT", TEXT.encode()))),
    Case(
        "several dots", members(("b.orig.png", OTHER), ("b.png", OTHER), ("b.txt", TEXT.encode()))
    ),
    Case("no extension", members(("LICENSE", b"free"), *B)),
    Case("hidden files", members(("._a.png", b"Mac OS X"), ("deep/.DS_Store", b"\0"), *B)),
    Case(
        "systems' files",
        members(("__MACOSX/._a.png", b"x"), ("@eaDir/a.png/S.jpg", b"x"), ("Thumbs.db", b"x"), *B),
    ),
    Case("__meta__ members", members(("__index__/a.json", b"{}"), *B)),
    Case("a member twice", members(*B, ("b.png", PICTURE))),
    Case("b.png and b.PNG", members(*B, ("b.PNG", PICTURE))),
    Case("members of a key apart", members(B[0], *sample("c"), B[1])),
    Case("keys that begin anew", special(lambda f: put(f, TWO, "second.tar"))),
    Case("one shard of two is a copy", special(lambda f: put(f, TWO, "copy.tar"))),
]

MEMBERS = [
    Case(
        "a symbolic link to a file outside",
        members((of_kind("a.json", tarfile.SYMTYPE, "/etc/passwd"), b""), *B),
    ),
    Case(
        "a hard link to a file outside",
        members((of_kind("a.json", tarfile.LNKTYPE, "/etc/passwd"), b""), *B),
    ),
    Case(
        "a hard link to a member", members((of_kind("b.png", tarfile.LNKTYPE, "a.png"), b""), B[1])
    ),
    Case(
        "devices",
        members(
            (of_kind("a.json", tarfile.CHRTYPE), b""), (of_kind("c.png", tarfile.BLKTYPE), b""), *B
        ),
    ),
    Case("a pipe", members((of_kind("a.json", tarfile.FIFOTYPE), b""), *B)),
    Case("a folder called b.png", members((of_kind("b.png", tarfile.DIRTYPE), b""), B[1])),
    Case("a tar in a tar", members(("a.tar", tar_of(sample())), *B)),
    Case("a zip in a tar", members(("a.zip", zipped(100)), *B)),
    Case("a .pkl that runs code", pickled("pkl")),
    Case("a .pyd that runs code", pickled("pyd")),
    Case("a .pickle that runs code", pickled("pickle")),
    Case("a .pth that runs code", pickled("pth", torch_like)),
    Case("a .npy of objects that run code", pickled("npy", objects)),
    Case("a pickle called .npy", pickled("npy")),
    Case(
        "a .npy of 2^40 numbers in 16 bytes",
        members(("a.npy", npy("(1099511627776,)", bytes(16))), *B),
    ),
    Case("a .npy whose size overflows", members(("a.npy", npy("(4294967296, 4294967296)")), *B)),
    Case("a .npy of negative shape", members(("a.npy", npy("(-4, 4)", bytes(64))), *B)),
    Case(
        "a .npy in Fortran's order", members(("a.npy", npy("(2, 3)", bytes(24), fortran=True)), *B)
    ),
    Case("a .npy whose header is code", members(("a.npy", npy("__import__('os').getpid()")), *B)),
    Case("a .npz called .npy", members(("a.npy", zipped(100)), *B)),
    Case("a .npz bomb, 200 MB in 200 kB", members(("a.npz", zipped(200_000_000)), *B)),
    Case(
        "a .txt.gz bomb, 2 GiB in 2 MB",
        members(("a.txt.gz", gzip.compress(bytes(1 << 20)) * 2048), *B),
    ),
    Case("a .cls that is no number", members(("a.cls", b"cat"), *B)),
]
