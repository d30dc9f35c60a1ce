"""Fetched once, checked, then offline for good; nothing half-made is ever seen."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck import archives
from limbeck.errors import DamagedError, MissingExtraError, SourceError
from limbeck.recipe import Source
from limbeck.sources import cache_entries, cache_folder, fetch, verify

URI = "pypi://tiny==1.0/tiny/data"
FILES = {
    "tiny/data/a.txt": b"aaa",
    "tiny/data/deep/b.txt": b"bbbb",
    "tiny/other.txt": b"other",
    "tiny-1.0.dist-info/METADATA": b"Name: tiny\nLicense-Expression: MIT\n",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Shop:
    """Stands in for pip: hands out a wheel and counts."""

    def __init__(self, folder):
        self.wheel, self.asked = folder / "tiny-1.0-py3-none-any.whl", []
        self.stock(FILES)

    def stock(self, files):
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        self.sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()

    def __call__(self, package, folder, *, where, tell):
        self.asked.append(package)
        return Path(shutil.copy(self.wheel, folder))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    shop = Shop(tmp_path)
    monkeypatch.setattr(archives, "download_wheel", shop)
    return shop


def get(uri=URI, sha256=None, **settings):
    return fetch(Source(uri=uri, sha256=sha256), where="data.train", **settings)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_member_is_fetched_with_what_is_known_of_it(shop):
    found = get()
    assert contents(found.path) == {"a.txt": b"aaa", "deep/b.txt": b"bbbb"}
    assert found.path.name == "data"
    assert (found.origin, found.licence, found.size_bytes) == ("pypi", "MIT", 7)
    assert found.sha256 == shop.sha256
    verify(found)


def test_the_second_time_nothing_is_asked_and_nothing_is_started(shop, monkeypatch):
    first = get()

    def refuse(*args, **settings):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setenv("PATH", "")
    assert get() == first
    assert len(shop.asked) == 1


def test_members_of_one_wheel_cost_one_download_however_it_is_spelt(shop):
    assert get("pypi://tiny==1.0/tiny/data/a.txt").path.read_bytes() == b"aaa"
    assert get("pypi://Tiny==1.0/tiny/other.txt").path.read_bytes() == b"other"
    assert get("pypi://tiny==1.0/tiny/data/").path.is_dir()
    assert shop.asked == ["tiny==1.0"]


def test_a_pinned_sha256_is_kept_to(shop, cache):
    assert get(sha256=shop.sha256).sha256 == shop.sha256
    for _ in range(2):  # of what is cached, and of what is not
        with pytest.raises(SourceError, match=r"^data\.train\.sha256: ") as raised:
            get(sha256="0" * 64)
        assert shop.sha256 in str(raised.value)
        assert "0" * 64 in str(raised.value)
        shutil.rmtree(cache)
    with pytest.raises(SourceError):
        get(sha256="0" * 64)
    assert not contents(cache)


def test_a_pin_that_cannot_fit_costs_no_download(shop, cache):
    get()
    next(cache.rglob("*.whl")).unlink()
    with pytest.raises(SourceError, match=rf"{shop.sha256}.*remove {cache}"):
        get("pypi://tiny==1.0/tiny/other.txt", sha256="0" * 64)
    assert len(shop.asked) == 1


def test_a_package_that_has_changed_since_it_was_first_fetched_is_refused(shop, cache):
    old = get().sha256
    next(cache.rglob("*.whl")).unlink()
    shop.stock({**FILES, "tiny/other.txt": b"evil"})
    with pytest.raises(SourceError, match="first fetched") as raised:
        get("pypi://tiny==1.0/tiny/other.txt")
    assert old in str(raised.value)
    assert shop.sha256 in str(raised.value)
    assert get().sha256 == old  # what was fetched before is still there


def damage_size(path):
    (path / "a.txt").write_bytes(b"aa")


def damage_name(path):
    (path / "a.txt").rename(path / "c.txt")


def damage_more(path):
    (path / "modeling.py").write_text("import os")


def damage_all(path):
    shutil.rmtree(path)


@pytest.mark.parametrize("damage", [damage_size, damage_name, damage_more, damage_all])
def test_a_damaged_entry_is_made_again_with_a_warning(shop, caplog, damage):
    found = get()
    damage(found.path)
    with pytest.raises(DamagedError):
        verify(found)
    with caplog.at_level(logging.WARNING):
        again = get()
    assert "damaged" in caplog.text
    assert again == found
    assert contents(again.path) == {"a.txt": b"aaa", "deep/b.txt": b"bbbb"}
    assert len(shop.asked) == 1, "the wheel was there"


def test_a_damaged_wheel_is_downloaded_again(shop, cache):
    get()
    wheel = next(cache.rglob("*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"!")
    assert get("pypi://tiny==1.0/tiny/other.txt").path.read_bytes() == b"other"
    assert len(shop.asked) == 2
    assert wheel.read_bytes() == shop.wheel.read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}', "\udcff"])
def test_a_damaged_record_is_no_record(shop, cache, text):
    get()
    for record in cache.rglob("*.json"):
        record.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert contents(get().path) == {"a.txt": b"aaa", "deep/b.txt": b"bbbb"}


def test_verify_reads_every_byte(shop):
    found = get()
    (found.path / "deep" / "b.txt").write_bytes(b"bbbc")  # same size: only the checksum tells
    assert get() == found
    with pytest.raises(DamagedError, match=r"deep/b\.txt"):
        verify(found)


def test_a_misspelt_member_does_not_cost_a_second_download(shop):
    with pytest.raises(SourceError, match=r"did you mean 'tiny/data'"):
        get("pypi://tiny==1.0/tiny/date")
    get()
    assert len(shop.asked) == 1


def test_a_package_that_does_not_unpack_is_not_kept(shop, cache):
    shop.wheel.write_bytes(b"no zip file")
    with pytest.raises(SourceError, match="damaged"):
        get()
    assert not contents(cache)
    shop.stock(FILES)
    assert contents(get().path) == {"a.txt": b"aaa", "deep/b.txt": b"bbbb"}


def test_a_disk_that_is_full_beforehand(shop, cache, monkeypatch):
    monkeypatch.setattr(archives, "_free_bytes", lambda folder: 6)
    with pytest.raises(SourceError, match=r"7 bytes are needed .*LIMBECK_CACHE") as raised:
        get()
    assert str(cache) in str(raised.value)
    assert not contents(cache)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_while_unpacking_leaves_nothing_behind(shop, cache, code):
    def fail(label, done, total):
        raise OSError(code, os.strerror(code))

    with pytest.raises(SourceError, match="LIMBECK_CACHE") as raised:
        get(progress=fail)
    assert ("7 bytes are needed" in str(raised.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert not contents(cache)
    assert get().size_bytes == 7


def test_a_cache_that_cannot_be_made_is_an_error_in_words(tmp_path, monkeypatch, shop):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match="LIMBECK_CACHE"):
        get()


def test_progress_tells_bytes(shop):
    told = []
    get(progress=lambda *args: told.append(args))
    assert told[-1][1:] == (7, 7)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


PROCESS = """
import shutil, sys, time
from pathlib import Path
from limbeck import archives, sources
from limbeck.recipe import Source
wheel, log, mode = sys.argv[1:]

def download(package, folder, *, where, tell):
    with open(log, "a") as file:
        file.write("asked\\n")
    if mode == "killed":
        (folder / "half.whl").write_bytes(b"half")
        import os; os._exit(9)
    time.sleep(0.5)
    return Path(shutil.copy(wheel, folder))

archives.download_wheel = download
print(sources.fetch(Source(uri="pypi://tiny==1.0/tiny/data"), where="x").size_bytes)
"""


def test_processes_at_once_all_end_well_with_one_download(shop, tmp_path):
    command = [sys.executable, "-c", PROCESS, str(shop.wheel), str(tmp_path / "log"), "slow"]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdout=pipe, stderr=pipe) for _ in range(3)]
    said = [process.communicate() for process in processes]
    assert said == [(b"7\n", b"")] * 3, "or one replaced what another was reading"
    assert (tmp_path / "log").read_text() == "asked\n"
    assert not [*tmp_path.rglob(".aside")]


def test_what_a_killed_process_left_is_cleared_away(shop, cache, tmp_path):
    command = [sys.executable, "-c", PROCESS, str(shop.wheel), str(tmp_path / "log"), "killed"]
    assert subprocess.run(command, check=False).returncode == 9
    assert [*cache.rglob("half.whl")]
    assert contents(get().path) == {"a.txt": b"aaa", "deep/b.txt": b"bbbb"}
    assert not [*cache.rglob("half.whl")]
    assert cache_entries() == [get()]


def test_the_cache_lists_its_entries_and_may_be_moved(shop, cache, tmp_path, monkeypatch):
    assert cache_entries() == []
    found = [get(), get("pypi://tiny==1.0/tiny/other.txt")]
    assert cache_entries() == found
    record = json.loads((found[0].path.parent.parent / "entry.json").read_text())
    assert record["files"] == {
        "a.txt": [3, hashlib.sha256(b"aaa").hexdigest()],
        "deep/b.txt": [4, hashlib.sha256(b"bbbb").hexdigest()],
    }
    cache.rename(tmp_path / "moved")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "moved"))
    assert [entry.uri for entry in cache_entries()] == [entry.uri for entry in found]
    assert get().path.is_relative_to(tmp_path / "moved")
    assert len(shop.asked) == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIMBECK_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("LIMBECK_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "limbeck"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "limbeck"


@pytest.mark.parametrize(
    "uri",
    [
        "pypi://tiny/tiny/data",
        "pypi://tiny==1.0",
        "pypi://tiny==1.0/",
        "pypi://tiny==1.0/../../etc/passwd",
        "pypi://tiny==1.0//etc/passwd",
        "pypi://tiny==1.0/a\\..\\b",
        "pypi://tiny>=1.0/a",
        "pypi://tiny==1.*/a",
        "pypi://--index-url=x==1.0/a",
        "pypi://tiny[extra]==1.0/a",
        "pypi://tiny==1.0;os_name=='x'/a",
        "pypi://tiny==1.0 --pre/a",
        "apt://Tiny/a",
        "apt://-o/a",
        "apt://tiny=1/a",
        "apt://tiny",
        "hf://org/name/train/more",
        "hf://name",
        "hf://../name/train",
        "ftp://tiny/a",
    ],
)
def test_what_is_no_source_is_refused_before_anything_is_started(shop, monkeypatch, cache, uri):
    monkeypatch.setattr(archives, "download_deb", shop)
    with pytest.raises(SourceError, match=r"^data\.train: ") as raised:
        get(uri, kind="data")
    assert raised.value.allowed
    assert not shop.asked
    assert not cache.exists()


def test_an_endpoint_is_no_teacher():
    """Probabilities of all tokens are needed, and none gives them."""
    uri = "https://api.example.org/v1"
    with pytest.raises(SourceError, match=r"^teacher: .*gives texts.*probabilities of all tokens"):
        fetch(Source(uri=uri), where="teacher", kind="model")
    with pytest.raises(SourceError, match="unknown https://"):
        fetch(Source(uri=uri), where="data.train", kind="data")


def test_a_misspelt_scheme_names_the_close_one():
    with pytest.raises(SourceError, match="did you mean 'pypi://'"):
        get("pipy://tiny==1.0/a")


def test_a_deb_goes_the_same_way(shop, monkeypatch, cache):
    def unpack(file, member, to, *, where, tell):
        to.with_name("tree").mkdir()  # where dpkg unpacks: must not become part of the entry
        (to / "data").mkdir(parents=True)
        (to / "data" / "a.txt").write_text("aaa")

    monkeypatch.setattr(archives, "download_deb", shop)
    monkeypatch.setattr(archives, "unpack_deb", unpack)
    found = get("apt://tiny-data/usr/share/data")
    assert (found.origin, found.uri) == ("apt", "apt://tiny-data/usr/share/data")
    assert contents(found.path) == {"a.txt": b"aaa"}
    assert {path.name for path in found.path.parent.parent.iterdir()} == {"content", "entry.json"}
    assert get("apt://tiny-data/usr/share/data") == found
    assert shop.asked == ["tiny-data"]


def test_a_local_file_and_folder(tmp_path, cache):
    folder = tmp_path / "my data"
    (folder / "deep").mkdir(parents=True)
    (folder / "B.txt").write_bytes(b"1")
    (folder / "a.txt").write_bytes(b"22")
    (folder / "deep" / "ä.txt").write_bytes(b"333")
    (folder / "deep" / "up").symlink_to(folder)  # a loop
    found = get("my data", base=tmp_path)
    assert (found.path, found.origin, found.size_bytes) == (folder, "local", 6)
    assert (found.uri, found.licence) == ("my data", None)
    listing = (
        "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    )
    by_hand = subprocess.run(listing, shell=True, cwd=folder, capture_output=True, check=True)
    assert found.sha256 == by_hand.stdout.split()[0].decode()
    file = get("my data/a.txt", base=tmp_path, sha256=hashlib.sha256(b"22").hexdigest())
    assert (file.path, file.size_bytes) == (folder / "a.txt", 2)
    assert not cache.exists()
    verify(file)
    (folder / "a.txt").write_bytes(b"33")
    with pytest.raises(DamagedError):
        verify(file)
    with pytest.raises(SourceError, match=r"^data\.train\.sha256") as raised:
        get(str(folder / "a.txt"), sha256=file.sha256)
    assert "remove" not in str(raised.value), "nobody is told to remove his own file"


def test_a_local_path_from_home_and_from_here(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert get("~/a.txt").path == get("a.txt").path == tmp_path / "a.txt"
    with pytest.raises(SourceError):
        get("~nobody-of-that-name/a.txt")


@pytest.mark.parametrize("wanted", ["corpora/train.csw", "corpus/train.csv", "corpora/trian.csv"])
def test_a_missing_path_names_the_close_ones(tmp_path, wanted):
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "train.csv").write_text("")
    with pytest.raises(SourceError) as raised:
        get(wanted, base=tmp_path, kind="data")
    assert str(tmp_path / wanted) in raised.value.found
    assert f"did you mean '{tmp_path / 'corpora'}" in raised.value.fix


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        get("pipe", base=tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for huggingface_hub: its cache holds links to blobs, and too much."""
    hub = ModuleType("huggingface_hub")
    hub.asked, hub.files = [], {}

    def snapshot_download(name, *, revision, allow_patterns, local_files_only):
        hub.asked.append((name, revision, local_files_only))
        if isinstance(hub.files, Exception):
            raise hub.files
        for file, content in hub.files.items():
            blob = tmp_path / "hub" / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = tmp_path / "hub" / "snapshot" / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return str(tmp_path / "hub" / "snapshot")

    hub.snapshot_download = snapshot_download
    hub.files = {
        "config.json": b"{}", "model.safetensors": b"w" * 50, "1_Pooling/config.json": b"{ }",
        "pytorch_model.bin": b"pickle", "modeling.py": b"import os", "tokenizer.py": b"import os",
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_model_comes_without_pickles_and_code(hub, tmp_path, monkeypatch, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    found = get("org/name@v1.0", base=tmp_path)
    assert contents(found.path).keys() == {
        "config.json", "model.safetensors", "1_Pooling/config.json"
    }  # fmt: skip
    assert not any(path.is_symlink() for path in found.path.rglob("*"))
    assert (found.origin, found.size_bytes) == ("hub", 55)
    assert get(str(found.path)).sha256 == found.sha256
    shutil.rmtree(tmp_path / "hub")
    assert get("org/name@v1.0", base=tmp_path) == get("hf://org/name@v1.0") == found
    assert hub.asked == [("org/name", "v1.0", offline)]
    verify(found)


def test_a_local_folder_comes_before_the_hub(hub, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert get("org/name", base=tmp_path).origin == "local"
    assert not hub.asked


def test_a_hub_model_of_pickles_only_is_refused(hub, tmp_path, cache):
    del hub.files["model.safetensors"]
    with pytest.raises(SourceError, match="safely"):
        get("org/name", base=tmp_path)
    assert not contents(cache)


def test_a_damaged_hub_model_must_come_again_as_it_was(hub, tmp_path):
    found = get("org/name", base=tmp_path)
    (found.path / "config.json").unlink()
    shutil.rmtree(tmp_path / "hub")
    hub.files["config.json"] = b"{evil}"
    with pytest.raises(SourceError, match="first fetched"):
        get("org/name", base=tmp_path)


@pytest.mark.parametrize("error", [OSError("no connection"), RuntimeError("404"), ValueError("")])
def test_what_the_hub_does_not_deliver_may_have_been_a_path(hub, tmp_path, error):
    hub.files = error
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    with pytest.raises(SourceError, match="did not deliver") as raised:
        get("models/minilmm", base=tmp_path)
    assert str(tmp_path / "models" / "minilm") in raised.value.fix


@pytest.mark.parametrize(
    ("uri", "kind", "module"),
    [("org/name", "model", "huggingface_hub"), ("hf://org/name/train", "data", "datasets")],
)
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, uri, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"limbeck\[fetch\]"):
        get(uri, kind=kind, base=tmp_path)


def test_a_hub_data_set_becomes_one_parquet_file(monkeypatch):
    asked = []

    class Rows:
        def to_parquet(self, path):
            pq.write_table(pa.table({"text": ["a", "b"]}), path)

    def load_dataset(name, *, split):
        asked.append((name, split))
        return Rows()

    datasets = ModuleType("datasets")
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    found = get("hf://org/name/train", kind="data")
    assert found.path.name == "train.parquet"
    assert pq.read_table(found.path).to_pydict() == {"text": ["a", "b"]}
    assert get("hf://org/name/train", kind="data") == found
    assert asked == [("org/name", "train")]


def test_no_torch_is_imported():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util, types, pathlib\n"
        "package = types.ModuleType('limbeck')\n"
        "package.__path__ = [str(pathlib.Path(sys.argv[1]).parent)]\n"
        "sys.modules['limbeck'] = package\n"
        "import limbeck.sources"
    )
    subprocess.run([sys.executable, "-c", code, archives.__file__], check=True)


@pytest.mark.network
def test_a_real_package(monkeypatch):
    uri = "pypi://six==1.16.0/six.py"
    pin = "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254"
    found = get(uri, sha256=pin)
    assert '__version__ = "1.16.0"' in found.path.read_text()
    assert found.licence == "MIT"
    monkeypatch.setenv("PATH", "")
    assert get(uri, sha256=pin) == found
