"""What the disk cache loads: only what this user or the superuser has written, and only regular files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cuattn import compile as cc
from cuattn.compile import cache
from cuattn.errors import CacheError, CacheWarning

Change = Callable[[Path], object]
TINY = 'extern "C" __global__ void tiny(int* x) { x[threadIdx.x] += 1; }'


def build_tiny(kind: str = "ptx") -> cc.Binary:
    return cc.build_source(TINY, name="tiny.cu", arch="sm_80", kind=kind)


STRANGER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give files away")
UNTRUSTED = [
    pytest.param(lambda path: path.chmod(path.stat().st_mode | 0o020), "its group may write", id="group"),
    pytest.param(lambda path: path.chmod(path.stat().st_mode | 0o002), "everybody may write", id="everybody"),
    pytest.param(lambda path: os.chown(path, STRANGER, -1), "belongs to user 12345", marks=needs_root, id="stranger"),
]


@pytest.mark.parametrize("part", ["", ".meta"])
@pytest.mark.parametrize(("change", "reason"), UNTRUSTED)
def test_a_file_that_others_could_write_is_made_anew(change: Change, reason: str, part: str) -> None:
    binary = build_tiny()
    victim = binary.path.with_name(binary.path.name + part)
    change(victim)
    cc.forget()
    with pytest.warns(CacheWarning, match=reason) as caught:
        assert build_tiny().image == binary.image
    assert len(caught) == 1
    assert str(binary.path) in str(caught[0].message)
    assert victim.stat().st_uid == os.geteuid()
    assert victim.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize(("change", "reason"), UNTRUSTED)
def test_a_directory_that_others_could_write_is_not_used(change: Change, reason: str, cache_dir: Path) -> None:
    known = build_tiny()
    change(cache_dir)
    cc.forget()
    before = sorted(cache_dir.iterdir())
    with pytest.warns(CacheWarning, match=reason) as caught:
        binary = build_tiny()
        build_tiny("cubin")
        assert cache.read("any", ".bin") is None
    assert len(caught) == 1
    assert "CUATTN_CACHE_DIR" in str(caught[0].message)
    assert binary.path.parent != known.path.parent
    for look_after in (cache.ls, cache.clear, cache.size_bytes):
        with pytest.raises(CacheError, match=reason):
            look_after()
    assert sorted(cache_dir.iterdir()) == before


def test_a_directory_of_the_superuser_is_read(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cache_dir.parent.stat().st_uid != 0:
        pytest.skip("the files of this test belong to the user who runs it")
    known = build_tiny()
    cc.forget()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert build_tiny().path == known.path


@pytest.mark.parametrize("part", ["", ".meta"])
@pytest.mark.parametrize("what", ["folder", "fifo", "full", "zero", "loop", "huge"])
def test_what_is_no_file_is_made_anew(what: str, part: str) -> None:
    binary = build_tiny()
    victim = binary.path.with_name(binary.path.name + part)
    victim.unlink()
    make = {
        "folder": victim.mkdir,
        "fifo": lambda: os.mkfifo(victim),
        "full": lambda: victim.symlink_to("/dev/full"),
        "zero": lambda: victim.symlink_to("/dev/zero"),
        "loop": lambda: victim.symlink_to(victim),
        "huge": lambda: (victim.touch(), os.truncate(victim, 1 << 40)),
    }
    make[what]()
    cc.forget()
    with pytest.warns(CacheWarning, match=binary.path.name):
        assert build_tiny().image == binary.image
    assert victim.is_file() and not victim.is_symlink()
    assert len(cache.ls()) == 1


def test_a_folder_with_something_in_the_place_of_an_entry_stays(cache_dir: Path) -> None:
    binary = build_tiny()
    binary.path.unlink()
    binary.path.mkdir()
    (binary.path / "letter").write_text("of somebody")
    cc.forget()
    with pytest.warns(CacheWarning):
        again = build_tiny()
    assert again.image == binary.image and again.path.parent != cache_dir
    assert (binary.path / "letter").read_text() == "of somebody"
    cache.clear()


def test_path_that_is_a_file_is_not_used(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir.write_text("a file")
    with pytest.warns(CacheWarning, match="not a directory"):
        first = build_tiny()
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(cache_dir / "below"))
    with pytest.warns(CacheWarning, match="Not a directory"):
        cc.forget()
        assert build_tiny().image == first.image
    assert cache_dir.read_text() == "a file"


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere", "relative"])
def test_without_a_home_a_temporary_folder_of_the_user_is_used(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd
    import tempfile

    monkeypatch.delenv("CUATTN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user whom nobody knows
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(CacheWarning, match="cannot be used") as caught:
        path = cache.write("some", ".bin", b"data")
        assert cache.read("some", ".bin") == b"data"
    assert len(caught) == 1
    assert path.parent == tmp_path / f"cuattn-{os.geteuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    # Where somebody was there before, the folder is of this process only.
    for make in (lambda: path.parent.mkdir(0o777), lambda: path.parent.symlink_to(tmp_path)):
        shutil.rmtree(path.parent)
        make()
        if not path.parent.is_symlink():
            path.parent.chmod(0o777)
        monkeypatch.setattr(cache, "_fallback", None)
        assert cache.write("some", ".bin", b"data").parent != path.parent
        if path.parent.is_symlink():
            path.parent.unlink()
            path.parent.mkdir()
