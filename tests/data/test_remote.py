"""Shards of an S3, moto's, and of a plain web server, both on loopback and failing now and then."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from remote_servers import BUCKET, Failing, Files, Hub, client, s3_server, served, upload, use
from support import assert_refused, own_pictures, tiny_pictures

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.data import remote
from flowray.data.check import check_shards
from flowray.data.decode import picture_of
from flowray.data.index import is_indexed, samples_in
from flowray.data.reader import ShardReader
from flowray.data.remote import (
    SUFFIX,
    RemoteCache,
    ahead,
    is_here,
    opened,
    plain,
    remote_of,
    shown,
    stat_of,
)
from flowray.data.remote_sets import PACKING
from flowray.data.shards import MANIFEST, are_plain, find_shards, lacking, sha256, tars
from flowray.store.sums import Sums

SET = f"s3://{BUCKET}/sets/drawn"
SAMPLES, PER_SHARD = 64, 16


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures(tmp_path_factory.mktemp("local") / "train", SAMPLES)


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[tuple[str, Failing]]:
    with s3_server() as (endpoint, failing):
        upload(endpoint, local, "sets/drawn")
        yield endpoint, failing


@pytest.fixture
def failing(
    server: tuple[str, Failing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Failing]:
    """The server for this process, with nothing fetched, sound until a test says otherwise."""
    endpoint, failing = server
    use(endpoint, monkeypatch)
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
    failing.seen.clear()
    yield failing
    failing.every = 0


@pytest.fixture
def endpoint(server: tuple[str, Failing]) -> str:
    return server[0]


def contents(reader: ShardReader) -> list[tuple[str, list[str], bytes]]:
    return [
        (reader.key(i), reader.captions(i), reader.read(i, str(picture_of(reader.extensions(i)))))
        for i in range(len(reader))
    ]


def bounded(tmp_path: Path, size: int) -> RemoteCache:
    return RemoteCache(tmp_path / "cache" / "remote", size)


def held(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in tmp_path.rglob("cache/**/*.tar"))


@pytest.mark.parametrize(
    ("spec", "shards"),
    [
        (SET, 4),
        (f"{SET}/", 4),
        (f"s3://{BUCKET}/sets", 4),
        (f"{SET}/shard-*[12].tar", 2),
        (f"s3://{BUCKET}/**/shard-00000?.tar", 4),
        (f"{SET}/shard-{{000001..000003}}.tar", 3),
        (f"s3://{BUCKET}/{{sets/drawn,sets}}", 4),
        (f"{SET}/shard-000002.tar", 1),
    ],
)
def test_every_form_finds_what_it_finds_on_a_disk(
    spec: str, shards: int, local: Path, failing: Failing
) -> None:
    found = find_shards(spec)
    names = [path.name for path in find_shards(str(local))]
    assert [path.name for path in found] == [name for name in names if name in str(found)]
    assert len(found) == shards
    assert [stat_of(path)[0] for path in found] == [
        (local / path.name).stat().st_size for path in found
    ]
    assert failing.fetched() == []  # it lists, and opens none


def test_planning_reads_no_shard(local: Path, failing: Failing, tmp_path: Path) -> None:
    found = find_shards(SET)
    assert [samples_in(path) for path in found] == [PER_SHARD] * 4
    assert Sums(tmp_path).of(found) == [sha256(local / path.name) for path in found]
    assert are_plain(found) == are_plain(find_shards(str(local)))
    assert not any(map(is_here, found))
    assert failing.fetched() == []


def test_samples_are_those_of_the_disk_though_the_server_fails(
    local: Path, failing: Failing
) -> None:
    failing.every = 3
    found = find_shards(SET)
    here = contents(ShardReader(found))
    assert here == contents(ShardReader(find_shards(str(local))))
    assert failing.failed >= 3
    failing.every = 0
    failing.seen.clear()
    assert contents(ShardReader(find_shards(SET))) == here
    assert failing.fetched() == []  # all is here


def test_a_cut_body_is_never_taken_for_a_shard(
    failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TRIES", 2)
    failing.every = 1
    with pytest.raises(InputError, match="cannot be reached or read, 2 times"):
        find_shards(SET)
    failing.every = 0
    (path, *_) = find_shards(SET)
    failing.every = 1
    with pytest.raises(InputError, match=f"{SET}/{path.name}: cannot be reached"):
        opened(path)
    assert [file for file in tmp_path.rglob("*.tar*") if not file.name.endswith(SUFFIX)] == []
    failing.every = 0
    opened(path).close()
    assert path.stat().st_size == stat_of(path)[0]


def test_a_cache_smaller_than_the_set_holds_what_it_may(
    local: Path, failing: Failing, tmp_path: Path
) -> None:
    every = {path.name: path.stat().st_size for path in local.glob("*.tar")}
    bound = 2 * max(every.values()) + 1
    cache = bounded(tmp_path, bound)
    found = find_shards(SET, cache)
    reader, most = ShardReader(found), 0
    expected = contents(ShardReader(find_shards(str(local))))
    order = np.random.default_rng(0).permutation(SAMPLES)
    for i in order.tolist():
        assert (reader.key(i), reader.captions(i)) == expected[i][:2]
        most = max(most, held(tmp_path))
    assert sum(every.values()) > bound >= most > 0
    assert all(map(is_indexed, found))  # indexes stay
    # of a bound below one shard, one shard is there
    for path in find_shards(SET, bounded(tmp_path, 1)):
        assert sha256(path) == sha256(local / path.name)
        assert len(list(tmp_path.rglob("cache/**/*.tar"))) == 1


def test_the_one_used_longest_ago_goes_first(failing: Failing, tmp_path: Path) -> None:
    found = find_shards(SET)
    size = max(stat_of(path)[0] for path in found)
    find_shards(SET, bounded(tmp_path, 2 * size))
    for path in (found[0], found[1], found[0]):
        opened(path).close()
    kept = opened(found[1])  # an open one may go and stays readable
    opened(found[0]).close()
    opened(found[2]).close()
    assert [is_here(path) for path in found] == [True, False, True, False]
    assert len(kept.read()) == stat_of(found[1])[0]
    kept.close()


def test_the_next_ones_are_fetched_while_one_is_in_use(failing: Failing, tmp_path: Path) -> None:
    found = find_shards(SET)
    going = ahead(found)
    next(going)
    going.close()  # it waits for what has begun
    assert [is_here(path) for path in found] == [False, True, True, False]
    assert list(ahead(found, lambda path: path != found[3])) == list(found)
    assert not is_here(found[3])
    # where they have no room beside it, they wait
    find_shards(SET, bounded(tmp_path, 1))
    opened(found[0]).close()
    failing.seen.clear()
    assert list(ahead(found)) == list(found)
    assert failing.fetched() == []


def _read(path: Path, times: int) -> None:
    for _ in range(times):
        opened(path).close()


def test_several_processes_fetch_a_shard_once(failing: Failing) -> None:
    (path, *_) = find_shards(SET)
    several = [mp.get_context("fork").Process(target=_read, args=(path, 20)) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 4
    assert len(failing.fetched()) == 1


def test_a_shard_that_changes_is_another_one(
    endpoint: str, failing: Failing, local: Path, tmp_path: Path
) -> None:
    one, other = (sorted(local.glob("*.tar"))[i].read_bytes() for i in (0, 1))
    s3 = client(endpoint)
    s3.put_object(Bucket=BUCKET, Key="changing/a.tar", Body=one)
    (path,) = find_shards(f"s3://{BUCKET}/changing")
    assert ShardReader([path]).key(0) == "s00000"
    (before,) = Sums(tmp_path).of([path])
    s3.put_object(Bucket=BUCKET, Key="changing/a.tar", Body=other)
    assert find_shards(f"s3://{BUCKET}/changing") == (path,)
    assert ShardReader([path]).key(0) == "s00016"
    assert Sums(tmp_path).of([path]) != [before]
    # the same bytes at another place are the same content
    s3.put_object(Bucket=BUCKET, Key="elsewhere/b.tar", Body=one)
    assert Sums(tmp_path).of(find_shards(f"s3://{BUCKET}/elsewhere")) == [before]
    # between listing and fetching
    path.unlink()
    s3.put_object(Bucket=BUCKET, Key="changing/a.tar", Body=one)
    assert_refused(lambda: opened(path), InputError, "has changed meanwhile")
    s3.delete_object(Bucket=BUCKET, Key="changing/a.tar")
    assert_refused(lambda: opened(path), InputError, "not there any more")


def test_other_bytes_than_the_manifest_s_are_refused(
    endpoint: str, failing: Failing, local: Path, tmp_path: Path
) -> None:
    upload(endpoint, local, "broken")
    name = "shard-000001.tar"
    data = bytearray((local / name).read_bytes())
    data[600] ^= 1
    client(endpoint).put_object(Bucket=BUCKET, Key=f"broken/{name}", Body=bytes(data))
    result = check_shards(f"s3://{BUCKET}/broken")
    assert [problem.shard for problem in result.problems] == [name]
    assert "sha256" in result.problems[0].what
    assert result.samples == SAMPLES - PER_SHARD


def test_a_shard_that_the_manifest_names_and_the_listing_lacks_is_said(
    endpoint: str, failing: Failing, local: Path
) -> None:
    upload(endpoint, local, "hole")
    spec, name = f"s3://{BUCKET}/hole", "shard-000002.tar"
    assert lacking(spec, find_shards(spec)) == []
    client(endpoint).delete_object(Bucket=BUCKET, Key=f"hole/{name}")
    (gone,) = lacking(spec, find_shards(spec))  # though its place in the cache was found before
    assert shown(gone) == f"{spec}/{name}"
    assert [problem.shard for problem in check_shards(spec).problems] == [name]
    some = f"{spec}/shard-00000[01].tar"
    assert lacking(some, find_shards(some)) == []  # nobody asked for the others


def test_a_data_set_of_a_hub_is_that_of_a_disk(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hf://` by huggingface_hub itself, against the answers of a hub on loopback."""
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    remote._filesystem.cache_clear()
    shutil.copytree(local, tmp_path / "hub" / "train")
    spec = "hf://datasets/org/set/train"
    with served(partial(Hub, tmp_path / "hub")) as port:
        options = {"endpoint": f"http://127.0.0.1:{port}", "token": False}
        monkeypatch.setitem(fsspec.config.conf, "hf", options)
        found = find_shards(spec)
        assert not any(map(is_here, found))
        assert [shown(path) for path in found] == [f"{spec}/{name.name}" for name in tars(local)]
        assert Sums(tmp_path).of(found) == [sha256(path) for path in tars(local)]
        assert samples_in(found[0]) == PER_SHARD
        assert contents(ShardReader(found)) == contents(ShardReader(find_shards(str(local))))
        assert [find_shards(f"{spec}/shard-00000{{1,3}}.tar")] == [found[1::2]]
        assert find_shards(f"{spec}/*[02].tar") == found[::2]
        (tmp_path / "hub" / "train" / "shard-000002.tar").unlink()
        remote._filesystem.cache_clear()  # a process asks a hub once what is in a folder
        assert [shown(path)[-16:] for path in lacking(spec, find_shards(spec))] == [
            "shard-000002.tar"
        ]
        assert_refused(lambda: find_shards(f"{spec}/nothing"), InputError, "no .tar file there")
    remote._filesystem.cache_clear()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (f"s3://{BUCKET}/nothing", "no .tar file there"),
        ("s3://no-such-bucket/x", "no .tar file there"),
        (f"{SET}/shard-9.tar", "no such file"),
        (f"{SET}/x*.tar", "no .tar file matches"),
        (f"{SET}/shard-00000{{3..5}}.tar", r"2 of 3 are not there, first .*shard-000004\.tar"),
        (f"{SET}/{{0..1000000}}.tar", "more than"),
        ("s3://name:secret@bucket/x", "credentials belong in the environment"),
        ("https://host/x.tar?X-Amz-Signature=secret", "credentials belong in the environment"),
        ("https://host/folder", "web servers list no folders"),
        ("ftp://host/x.tar", "got ftp://"),
        ("pipe:curl -u me:secret http://host/x.tar", "got an address"),
        ("s3://", "a place"),
        (f"s3://{BUCKET}/a/../b.tar", "no such file|is no path"),
    ],
)
def test_what_is_no_set_is_one_line_without_secrets(
    spec: str, words: str, failing: Failing
) -> None:
    assert_refused(lambda: find_shards(spec), InputError, words)
    with pytest.raises(InputError) as caught:
        find_shards(spec)
    assert "secret" not in str(caught.value)


def test_errors_of_libraries_lose_what_may_be_secret() -> None:
    error = ValueError("403 at https://me:pw@host/a.tar?sig=abc, really\nanother line")
    assert plain(error) == "403 at https://host/a.tar really another line"


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowray.data", "check", "gs://bucket/x"],
        capture_output=True,
        text=True,
        env=os.environ | {"FLOWRAY_CACHE": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert "pip install gcsfs" in done.stderr.splitlines()[-1]


def test_a_json_that_lies_elsewhere_says_nothing(failing: Failing, tmp_path: Path) -> None:
    (path, *_) = find_shards(SET)
    planted = tmp_path / path.name
    planted.with_name(path.name + SUFFIX).write_text(path.with_name(path.name + SUFFIX).read_text())
    assert remote_of(path) is not None
    assert shown(path) == f"{SET}/{path.name}"
    assert remote_of(planted) is None
    assert shown(planted) == str(planted)


def test_keys_that_are_no_paths_stay_out_of_the_disk(
    endpoint: str, failing: Failing, local: Path, tmp_path: Path
) -> None:
    data = (local / "shard-000000.tar").read_bytes()
    client(endpoint).put_object(Bucket=BUCKET, Key="odd//a.tar", Body=data)
    assert_refused(lambda: find_shards(f"s3://{BUCKET}/odd/*/a.tar"), InputError, ".")
    empty = b"\0" * 10240
    client(endpoint).put_object(Bucket=BUCKET, Key="empty/a.tar", Body=empty)
    assert_refused(lambda: find_shards(f"s3://{BUCKET}/empty"), InputError, "not one sample")


class TestPacking:
    def test_a_set_is_packed_to_a_bucket_as_to_a_folder(
        self, endpoint: str, failing: Failing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures = own_pictures(tmp_path / "own")
        words = ["pack", str(pictures), "--val", "0.3", "--per-shard", "5"]
        assert main([*words, str(tmp_path / "packed")]) == 0
        failing.every = 7
        there = f"s3://{BUCKET}/packed/set"
        assert main([*words, there]) == 0
        assert failing.failed
        failing.every = 0
        rows = client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix="packed/")["Contents"]
        for folder in ("train", "val"):
            here = {path.name: path for path in (tmp_path / "packed" / folder).iterdir()}
            prefix = f"packed/set/{folder}/"
            keys = [row["Key"] for row in rows if row["Key"].startswith(prefix)]
            assert {key.removeprefix(prefix) for key in keys} == set(here)
            for name, path in here.items():
                body = client(endpoint).get_object(Bucket=BUCKET, Key=prefix + name)["Body"]
                assert body.read() == path.read_bytes()
        assert len(rows) == sum(len(list(d.iterdir())) for d in (tmp_path / "packed").iterdir())
        capsys.readouterr()
        assert main(["check", there, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["samples"] == 24
        page = tmp_path / "page.html"
        assert main(["show", there, "--out", str(page), "--json"]) == 0
        assert page.is_file()
        assert_refused(lambda: main([*words, there]), InputError, "not empty")
        # splits are not one set
        assert_refused(lambda: find_shards(there), InputError, "did you mean .*/train")

    def test_what_is_not_whole_is_no_set(
        self, endpoint: str, failing: Failing, tmp_path: Path, local: Path
    ) -> None:
        pictures = own_pictures(tmp_path / "own")
        (pictures / "023.png").write_bytes(b"no picture")
        there = f"s3://{BUCKET}/cut"
        words = ["pack", str(pictures), there, "--per-shard", "5"]
        assert_refused(lambda: main(words), InputError, "nothing packed")
        assert any("/cut/" in path for method, path in failing.seen if method == "PUT")
        assert "Contents" not in client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix="cut/")
        # a kill leaves the mark
        (shard, *_) = sorted(local.glob("*.tar"))
        for name, body in ((PACKING, b""), (shard.name, shard.read_bytes())):
            client(endpoint).put_object(Bucket=BUCKET, Key=f"cut/{name}", Body=body)
        for spec in (there, f"{there}/*.tar", f"{there}/{shard.name}"):
            assert_refused(partial(find_shards, spec), InputError, "being packed")

    def test_a_bucket_that_is_not_there_is_one_line(self, endpoint: str, tmp_path: Path) -> None:
        words = ["pack", str(own_pictures(tmp_path / "own", 3)), "s3://not-there/set"]
        says = r"^s3://not-there/set/\S+: cannot be written: "
        assert_refused(lambda: main(words), InputError, says)

    @pytest.mark.parametrize("out", ["https://host/x", "hf://datasets/a/b"])
    def test_what_can_only_be_read_is_refused(
        self, out: str, tmp_path: Path, failing: Failing
    ) -> None:
        pictures = own_pictures(tmp_path / "own", 3)
        assert_refused(lambda: main(["pack", str(pictures), out]), InputError, "only be read")
        assert_refused(
            lambda: main(["pack", f"s3://{BUCKET}/own", str(tmp_path / "out")]),
            InputError,
            "from a folder",
        )


class TestWebServer:
    @pytest.fixture
    def web(self, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
        with served(partial(Files, directory=str(local))) as port:
            yield f"http://127.0.0.1:{port}"

    @pytest.mark.parametrize("plainly", [True, False])
    def test_braces_name_its_tars(
        self, plainly: bool, web: str, local: Path, tmp_path: Path
    ) -> None:
        manifest = local / MANIFEST
        hidden = manifest.rename(tmp_path / MANIFEST) if not plainly else manifest
        try:
            found = find_shards(f"{web}/shard-{{000000..000003}}.tar")
            assert contents(ShardReader(found)) == contents(ShardReader(find_shards(str(local))))
            assert check_shards(f"{web}/shard-{{000000..000003}}.tar").good
            sums = Sums(tmp_path).of(found)
            assert (sums == Sums(tmp_path).of(find_shards(str(local)))) == plainly
        finally:
            hidden.rename(manifest)

    def test_a_folder_of_it_is_one_line(self, web: str) -> None:
        assert_refused(lambda: find_shards(web), InputError, "name the tars")
        assert_refused(
            lambda: find_shards(f"{web}/shard-00000{{3..4}}.tar"), InputError, "1 of 2 are not"
        )
