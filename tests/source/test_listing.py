# pathlib cannot hold paths of bytes:

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tracemalloc
from array import array
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import patterns
from pipeline.config import load_job
from pipeline.errors import UsageError
from pipeline.source import listing as collection
from pipeline.source.fingerprints import Listing
from pipeline.source.identity import absolute_source, is_same_source
from pipeline.source.listing import SUFFIXES, list_collection, walks_into
from pipeline.source.names import absolute_path, decode_path, encode_path
from pipeline.source.urls import Meta, Url
from pipeline.store.objects import place

HOSTILE_NAMES = [
    b"plain.jpg",
    b"with space .jpg",
    b"new\nline.jpg",
    b"50%.jpg",
    b"%41.jpg",
    b"%.jpg",
    b"latin-\xe9.jpg",
    b"\xff\xfe\x80.jpg",
    b"surrogate-\xed\xb2\x80.jpg",
    "grüße-図.jpg".encode(),
    "e\u0301.jpg".encode(),
    "é.jpg".encode(),
    b"quote'\".jpg",
    b"back\\slash.jpg",
    b"comma,.jpg",
    b"tab\t.jpg",
    b"#hash.jpg",
    b"-dash.jpg",
]


def make(root: Path, *names: str | bytes) -> None:
    """Create files whose content is their own name."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))


def read(listing: Listing, i: int) -> bytes:
    with open(absolute_path(listing.root, listing.paths[i]), "rb") as file:
        return file.read()


def refusal(source: str | Path) -> str:
    """Return the message with which both functions, or the listing alone, refuse a source; it is one paragraph."""
    with pytest.raises(UsageError) as caught:
        list_collection(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# names


@given(st.lists(st.integers(1, 255), max_size=40).map(bytes))
def test_decode_path_is_the_inverse_of_encode_path(raw: bytes) -> None:
    encoded = encode_path(raw)
    encoded.encode("utf-8")  # no lone surrogates: the store keeps UTF-8
    assert decode_path(encoded) == raw


@given(st.text(st.characters(codec="utf-8", exclude_characters="%")))
def test_utf8_stays_as_it_is(text: str) -> None:
    assert encode_path(text.encode()) == text


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_encoding_keeps_folders_apart(folder: bytes, name: bytes) -> None:
    assert encode_path(folder + b"/" + name) == f"{encode_path(folder)}/{encode_path(name)}"


def test_every_byte_that_is_not_utf8_becomes_upper_case_hex() -> None:
    assert encode_path(b"a%b\xff\xe9/\x80") == "a%25b%FF%E9/%80"
    assert decode_path("a%25b%FF%E9/%80") == b"a%b\xff\xe9/\x80"


def test_absolute_path_joins_bytes() -> None:
    assert absolute_path("/", "a%FF.jpg") == b"/a\xff.jpg"
    assert absolute_path(os.fsdecode(b"/disk\xff"), "b/c.jpg") == b"/disk\xff/b/c.jpg"


def test_hostile_names_in_a_folder_open_again(tmp_path: Path) -> None:
    make(tmp_path, *(b"sub \xff%/" + name for name in HOSTILE_NAMES))
    listing = list_collection(str(tmp_path))
    assert [read(listing, i) for i in range(len(listing))] == sorted(b"sub \xff%/" + name for name in HOSTILE_NAMES)
    assert all(path.startswith("sub %FF%25/") for path in listing.paths)


# the values


def test_a_listing_is_a_frozen_value(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    listing = list_collection(str(tmp_path))
    with pytest.raises(FrozenInstanceError, match="root"):
        listing.root = "/elsewhere"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(listing)) == listing == list_collection(str(tmp_path))
    assert "a.jpg" not in repr(listing)


def test_fingerprint_tells_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(0, 1_234_567_890_123_456_789))
    (tmp_path / "b.jpg").symlink_to("gone")
    (tmp_path / "c.jpg").touch()
    os.utime(tmp_path / "c.jpg", ns=(0, -1_000_000_000))
    listing = list_collection(str(tmp_path))
    assert [listing.fingerprint(i) for i in range(3)] == ["5-1234567890123456789", "unreadable", "0--1000000000"]
    assert listing.size_bytes == array("q", [5, -1, 0])
    assert listing.mtime_ns == array("q", [1_234_567_890_123_456_789, -1, -1_000_000_000])


@pytest.mark.parametrize(("mtime_ns", "kept"), [(2**70, 2**63 - 1), (-(2**70), -(2**63))])
def test_absurd_times_do_not_overflow(mtime_ns: int, kept: int) -> None:
    status = SimpleNamespace(st_mode=stat.S_IFREG, st_size=1, st_mtime_ns=mtime_ns)
    assert collection._measure(lambda: status) == (1, kept)  # type: ignore[arg-type,return-value]


def test_limit_is_no_complete_listing(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    listing = list_collection(str(tmp_path))
    assert listing.complete
    first = listing.limit(2)
    assert (first.paths, len(first), first.complete, first.root) == (["a.jpg", "b.jpg"], 2, False, listing.root)
    assert first.fingerprint(1) == listing.fingerprint(1)
    assert listing.limit(3).complete
    assert listing.limit(4) == listing


# folders


def test_a_folder_lists_every_suffix_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, *(f"in{suffix}" for suffix in SUFFIXES), *(f"up{suffix.upper()}" for suffix in SUFFIXES))
    make(tmp_path, "notes.txt", "noext", "photo.jpg.bak", ".jpg", "jpg", "archive.tar.gz")
    listing = list_collection(str(tmp_path))
    expected = {f"in{suffix}" for suffix in SUFFIXES} | {f"up{suffix.upper()}" for suffix in SUFFIXES}
    assert set(listing.paths) == expected
    assert len(listing) == len(expected) == 2 * 16


def test_hidden_names_count_but_not_those_that_macos_adds(tmp_path: Path) -> None:
    make(tmp_path, ".hidden.jpg", ".cache/x.png", "a.jpg", "._a.jpg", "sub/._b.png", "._folder/c.png")
    assert list_collection(str(tmp_path)).paths == ["._folder/c.png", ".cache/x.png", ".hidden.jpg", "a.jpg"]


def test_same_stem_in_two_folders_stays_two_images(tmp_path: Path) -> None:
    make(tmp_path, "a/photo.jpg", "b/photo.jpg", "b/photo.png")
    assert list_collection(str(tmp_path)).paths == ["a/photo.jpg", "b/photo.jpg", "b/photo.png"]


def test_order_is_that_of_bytes_whatever_was_created_first(tmp_path: Path) -> None:
    expected = ["B.jpg", "a/b/x.jpg", "a/z.jpg", "a-b/x.jpg", "a.jpg", "b.jpg", "é.jpg", "%FF.jpg"]
    for seed in range(5):
        names = [decode_path(path) for path in expected]
        random.Random(seed).shuffle(names)
        make(tmp_path / str(seed), *names)
        assert list_collection(str(tmp_path / str(seed))).paths == expected


def test_a_folder_with_an_image_suffix_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "scan.tif/page.tif")
    assert list_collection(str(tmp_path)).paths == ["scan.tif/page.tif"]


def test_root_is_absolute_and_normal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "in/a.jpg")
    monkeypatch.chdir(tmp_path)
    for source in ("in", "./in/", "in/../in", f"/{tmp_path}/in"):
        assert list_collection(source).root == str(tmp_path / "in")
    assert list_collection(".").paths == ["in/a.jpg"]


def test_a_root_of_any_bytes(tmp_path: Path) -> None:
    make(tmp_path, b"r\xff[1]/a.jpg")
    listing = list_collection(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff[1]"))
    assert read(listing, 0) == b"r\xff[1]/a.jpg"


def test_symlinks_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    make(tmp_path, "real/a.jpg", "real/deep/b.jpg")
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "link.jpg").symlink_to("real/a.jpg")
    (tmp_path / "real/deep/loop").symlink_to("../..")
    (tmp_path / "real/self").symlink_to(".")
    listing = list_collection(str(tmp_path))
    assert listing.paths == ["alias/a.jpg", "alias/deep/b.jpg", "link.jpg", "real/a.jpg", "real/deep/b.jpg"]
    assert listing.unreadable == ()
    assert listing.size_bytes[2] == len("real/a.jpg")


def test_a_broken_link_is_an_image_or_perhaps_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("gone.jpg")
    (tmp_path / "c.jpg").symlink_to("c.jpg")  # a link to itself
    (tmp_path / "disk2").symlink_to("/mnt/not/mounted")
    (tmp_path / "notes.txt").symlink_to("gone.txt")
    listing = list_collection(str(tmp_path))
    assert listing.paths == ["a.jpg", "b.jpg", "c.jpg"]
    assert list(listing.size_bytes) == [5, -1, -1]
    assert listing.unreadable == ("disk2",)
    assert "disk2" in caplog.text


@pytest.mark.parametrize("form", ["folder", "pattern", "list"])
def test_what_may_block_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str) -> None:
    folder = tmp_path / "in"
    make(folder, "a.jpg")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "link.jpg").symlink_to("fifo.jpg")
    (folder / "null.png").symlink_to("/dev/null")
    (tmp_path / "list.txt").write_text("in/a.jpg\nin/fifo.jpg\nin/link.jpg\nin/null.png\n")
    source = {"folder": "in", "pattern": "in/*.*", "list": "list.txt"}[form]
    listing = list_collection(str(tmp_path / source))
    assert [os.path.basename(path) for path in listing.paths] == ["a.jpg"]
    assert caplog.text.count("is a fifo, socket or device") == 3


def test_a_file_that_vanishes_meanwhile_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg", "b.jpg")

    def vanish(name: bytes, others: object) -> bool:
        os.unlink(os.path.join(os.fsencode(tmp_path), name))
        return True

    monkeypatch.setattr(collection, "_is_image", vanish)
    listing = list_collection(str(tmp_path))
    assert listing.paths == ["a.jpg", "b.jpg"]
    assert [listing.fingerprint(i) for i in range(2)] == ["unreadable", "unreadable"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_folder_that_fails_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    make(tmp_path, "a/x.jpg", b"bad\xff/x.jpg", "c/x.jpg")
    scandir = os.scandir

    def faulty(path: bytes) -> object:
        if path.endswith(b"bad\xff"):
            raise OSError(code, os.strerror(code))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", faulty)
    listing = list_collection(str(tmp_path))
    assert (listing.paths, listing.unreadable, listing.complete) == (["a/x.jpg", "c/x.jpg"], ("bad%FF",), True)
    assert listing.limit(1).unreadable == ("bad%FF",)
    assert os.strerror(code) in caplog.text


def test_very_deep_folders_need_no_recursion(tmp_path: Path) -> None:
    make(tmp_path, "keep.jpg")
    deepest = tmp_path
    for _ in range(1200):
        deepest /= "d"
        deepest.mkdir()
    make(deepest, "x.jpg")
    listing = list_collection(str(tmp_path))
    assert [len(path) for path in listing.paths] == [2 * 1200 + len("x.jpg"), len("keep.jpg")]
    (deepest / "x.jpg").unlink()
    os.removedirs(deepest)  # pytest's own clean-up would recurse


def test_a_path_too_long_for_the_system_is_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("x.jpg").touch()
    listing = list_collection(str(tmp_path))
    assert listing.paths == ["a.jpg"]
    assert len(listing.unreadable) == 1
    assert len(listing.unreadable[0]) > 3000


AS_NOBODY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from pipeline.source.listing import list_collection
from pipeline.errors import UsageError
root = sys.argv[2]
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    os.listdir(root + "/locked")
    sys.exit("the folder can be read: this proves nothing")
except PermissionError:
    pass
listing = list_collection(root)
pattern = list_collection(root + "/*/*.jpg")
refused = []
for source in ("locked", "locked/*.jpg", "locked/a.jpg", "list.txt"):
    try:
        list_collection(f"{root}/{source}")
    except UsageError as error:
        refused.append(str(error))
values = [listing.paths, list(listing.size_bytes), listing.unreadable, pattern.paths, pattern.unreadable, refused]
sys.stdout.write(json.dumps(values))
"""


def test_unreadable_folders_are_named_and_keep_their_images() -> None:
    root = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))  # pytest's tmp_path is closed to other users
    try:
        make(root, "a/x.jpg", "locked/a.jpg", "names only/sub/y.jpg", "names only/z.jpg", "list.txt")
        (root / "behind").symlink_to("locked/sub")
        (root / "list.txt").chmod(0)
        root.chmod(0o755)
        (root / "locked").chmod(0)
        (root / "names only").chmod(0o444)
        command = [sys.executable, "-c", AS_NOBODY, str(Path(collection.__file__).parents[2]), str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
        paths, sizes, unreadable, matched, not_matched, refused = json.loads(done.stdout)
    finally:
        for folder in ("locked", "names only"):
            (root / folder).chmod(0o755)
        shutil.rmtree(root)
    assert (paths, sizes) == (["a/x.jpg", "names only/z.jpg"], [7, -1])
    assert unreadable == ["behind", "locked", "names only/sub"]
    assert (matched, not_matched) == (["a/x.jpg", "names only/z.jpg"], ["behind", "locked"])
    assert [text.split("(")[0].rsplit(" ", 3)[1:] for text in refused[:2]] == [["be", "read", ""]] * 2
    assert "cannot be reached" in refused[2]
    assert "list.txt' cannot be read ([Errno 13]" in refused[3]
    assert all("Permission denied" in text and "nothing was marked as removed" in text for text in refused)


# patterns

TREE = ["a.jpg", "a.txt", "b[1].jpg", "x/a.jpg", "x/y/a.jpg", "x/y/z/c.dat", "x/.h/a.jpg", ".h.jpg", "é.jpg", "deep/x/y/a.jpg"]
PATTERNS = [
    *("*", "*.jpg", "?.jpg", "[ab].jpg", "[!a].jpg", ".*", "b[[]1].jpg", "*/*.jpg", "*/y/*", "x/*/a.jpg", "**", "**/*"),
    *(
        "**/*.jpg",
        "**/a.jpg",
        "x/**",
        "x/**/a.jpg",
        "**/y/**",
        "**/y/**/*.dat",
        "**/x/**/a.*",
        "**/**/a.jpg",
        "**/.h/*",
        "x/.*/*",
    ),
    *("x/*/../*.jpg", "x/./y/*", "*/", "x//y/*.jpg", "**/*y*/*.jpg", "**/**", "x/[y]/a.jpg", "*/**/*/a.jpg"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_the_standard_library_matches(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, *TREE)
    listing = list_collection(f"{tmp_path}/{pattern}")
    listed = [os.fsdecode(absolute_path(listing.root, path)) for path in listing.paths]
    reference = glob.glob(os.path.normpath(f"{tmp_path}/{pattern}"), recursive=True)
    assert sorted(listed) == sorted({path for path in reference if os.path.isfile(path)})
    assert len(set(listed)) == len(listed)


def test_the_root_of_a_pattern_is_its_longest_folder_without_wildcards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "in/b/x.dat", "in/a/x.dat", "in/a/w.jpg")
    listing = list_collection(f"{tmp_path}/in/*/x.dat")
    assert (listing.root, listing.paths, listing.complete) == (str(tmp_path / "in"), ["a/x.dat", "b/x.dat"], True)
    monkeypatch.chdir(tmp_path)
    assert list_collection("in/**/*.jpg").root == str(tmp_path / "in")
    assert list_collection("**/*.jpg").root == str(tmp_path)
    monkeypatch.chdir(tmp_path / "in")
    assert list_collection("../in/*/w*").paths == ["a/w.jpg"]


def test_a_pattern_of_the_root_folder_itself() -> None:
    listing = list_collection("/[d]ev/../[p]roc/[v]ersion")
    assert (listing.root, listing.paths) == ("/", ["proc/version"])


def test_a_name_with_wildcards_that_exists_is_no_pattern(tmp_path: Path) -> None:
    make(tmp_path, "set[1]/a.jpg", "set1/b.jpg")
    assert list_collection(f"{tmp_path}/set[1]").paths == ["a.jpg"]


def test_a_pattern_follows_links_and_lists_broken_ones(tmp_path: Path) -> None:
    make(tmp_path, "real/a.jpg", b"real/\xff.jpg")
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "real/loop").symlink_to("..")
    (tmp_path / "real/gone.jpg").symlink_to("nowhere")
    listing = list_collection(f"{tmp_path}/**/*.jpg")
    names = ["a.jpg", "gone.jpg", "%FF.jpg"]
    assert listing.paths == [f"{folder}/{name}" for folder in ("alias", "real") for name in names]
    assert listing.size_bytes[1] == -1
    (tmp_path / "nowhere").symlink_to("gone")
    assert list_collection(f"{tmp_path}/n*").fingerprint(0) == "unreadable"


def test_a_pattern_enters_only_folders_that_can_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.jpg", "b/2.jpg", "a/deep/3.jpg", "a/deep.jpg/4.jpg")
    entered = []
    scandir = os.scandir

    def noted(path: bytes) -> object:
        entered.append(os.path.basename(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    assert list_collection(f"{tmp_path}/a*/*.jpg").paths == ["a/1.jpg"]
    assert entered == [os.fsencode(tmp_path.name), b"a"]


# lists


def test_a_text_list_keeps_its_order_and_any_name(tmp_path: Path) -> None:
    names = [name for name in HOSTILE_NAMES if b"\n" not in name and not name.startswith(b"#")]
    make(tmp_path, *HOSTILE_NAMES)
    random.Random(1).shuffle(names)
    lines = [b"# a comment", b"", b"   ", *names, b"./#hash.jpg"]
    for end in (b"\n", b"\r\n"):
        (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + end.join(lines))
        listing = list_collection(str(tmp_path / "list.txt"))
        assert [read(listing, i) for i in range(len(listing))] == [*names, b"#hash.jpg"]
        assert (listing.root, listing.complete) == (str(tmp_path), True)


def test_a_csv_list_keeps_any_name(tmp_path: Path) -> None:
    make(tmp_path, *HOSTILE_NAMES)
    quoted = [b'"' + name.replace(b'"', b'""') + b'"' for name in HOSTILE_NAMES]
    for end, header, before in ((b"\n", b"label,path,size", b"x,"), (b"\r\n", b"path,size", b"")):
        rows = [header, *(before + name + b",1" for name in quoted), b""]
        (tmp_path / "list.CSV").write_bytes(b"\xef\xbb\xbf" + end.join(rows))
        listing = list_collection(str(tmp_path / "list.CSV"))
        assert [read(listing, i) for i in range(len(listing))] == HOSTILE_NAMES


@pytest.mark.parametrize(
    "text",
    ["path;label\na.jpg;1,5\nb,c.jpg;2\n", '"label";"path"\n1,5;"a.jpg"\n2;"b,c.jpg"\n', "label\tpath\n1\ta.jpg\n2\tb,c.jpg\n"],
)
def test_a_csv_list_may_have_semicolons_or_tabs(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    assert list_collection(str(tmp_path / "list.csv")).paths == ["a.jpg", "b,c.jpg"]


def test_a_csv_list_of_one_column_may_have_semicolons_in_its_names(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\na;b.jpg\n")
    assert list_collection(str(tmp_path / "list.csv")).paths == ["a;b.jpg"]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_parquet_list_keeps_any_name(tmp_path: Path, as_text: bool) -> None:
    names = [name for name in HOSTILE_NAMES if not as_text or name.decode("utf-8", "ignore").encode() == name]
    make(tmp_path, *names)
    table = pd.DataFrame({"label": 1, "path": [name.decode() if as_text else name for name in names]})
    table.to_parquet(tmp_path / "list.parquet")
    listing = list_collection(str(tmp_path / "list.parquet"))
    assert [read(listing, i) for i in range(len(listing))] == names


def test_entries_may_lie_anywhere_and_the_root_is_what_they_share(tmp_path: Path) -> None:
    make(tmp_path, "one/a.jpg", "one/sub/b.jpg", "two/c.jpg", "ones/d.jpg")
    source = tmp_path / "one/list.txt"
    for text, root, paths in [
        ("a.jpg\n./sub/../sub/b.jpg", "one", ["a.jpg", "sub/b.jpg"]),
        ("sub/b.jpg\n", "one", ["sub/b.jpg"]),
        (f"{tmp_path}/one/a.jpg", "one", ["a.jpg"]),
        ("../two/c.jpg\na.jpg", "", ["two/c.jpg", "one/a.jpg"]),
        ("../ones/d.jpg\na.jpg", "", ["ones/d.jpg", "one/a.jpg"]),
        (f"/{tmp_path}//two/c.jpg", "two", ["c.jpg"]),
        ("../two/c.jpg\n../two/gone/e.jpg", "two", ["c.jpg", "gone/e.jpg"]),
    ]:
        source.write_text(text)
        listing = list_collection(str(source))
        assert (listing.root, listing.paths) == (str(tmp_path / root).rstrip("/"), paths)


def test_entries_that_share_only_the_root_folder(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("/nowhere/a.jpg\n/elsewhere/b.jpg\n")
    listing = list_collection(str(tmp_path / "list.txt"))
    assert (listing.root, listing.paths) == ("/", ["nowhere/a.jpg", "elsewhere/b.jpg"])
    assert absolute_path(listing.root, listing.paths[0]) == b"/nowhere/a.jpg"


def test_duplicates_are_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.txt").write_text(f"b.jpg\na.jpg\n./b.jpg\nx/../b.jpg\n{tmp_path}/a.jpg\n//{tmp_path}/a.jpg\n")
    with caplog.at_level(logging.WARNING):
        assert list_collection(str(tmp_path / "list.txt")).paths == ["b.jpg", "a.jpg"]
    assert "has 4 duplicate entries" in caplog.text


def test_entries_that_are_no_file_are_accounted_for(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "folder/b.jpg")
    (tmp_path / "link.jpg").symlink_to("gone")
    entries = ["a.jpg", "missing.jpg", "folder", "link.jpg", "x" * 300 + ".jpg", "y/" * 3000 + "z.jpg", "a.jpg/below.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(entries))
    listing = list_collection(str(tmp_path / "list.txt"))
    assert listing.paths == entries
    assert list(listing.size_bytes) == [5, -1, -1, -1, -1, -1, -1]


def test_entries_without_a_name_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "a.jpg")
    (tmp_path / "list.csv").write_text('n,path\n1,a.jpg\n2,\n3\n\n4,""\n5,/\n')
    assert list_collection(str(tmp_path / "list.csv")).paths == ["a.jpg"]
    assert "has 4 entries without a name" in caplog.text
    pd.DataFrame({"path": ["a.jpg", None, ""]}).to_parquet(tmp_path / "list.parquet")
    assert list_collection(str(tmp_path / "list.parquet")).paths == ["a.jpg"]
    assert "has 2 entries without a name" in caplog.text


def test_a_list_costs_few_bytes_per_image(tmp_path: Path) -> None:
    n = 30_000
    (tmp_path / "list.txt").write_text("".join(f"photos/{i % 100:04d}/image_number_{i:07d}.jpg\n" for i in range(n)))
    list_collection(str(tmp_path / "list.txt"))  # imports and caches do not count
    tracemalloc.start()
    try:
        listing = list_collection(str(tmp_path / "list.txt"))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing) == n
    assert kept / n < 150
    assert peak / n < 300


def test_a_folder_costs_few_bytes_per_image(tmp_path: Path) -> None:
    n = 5_000
    make(tmp_path, *(f"{i % 10}/image_number_{i:07d}.jpg" for i in range(n)))
    tracemalloc.start()
    try:
        listing = list_collection(str(tmp_path))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing) == n
    assert kept / n < 150
    assert peak / n < 300


# refusals


@pytest.mark.parametrize("source", ["", "missing", "missing.jpg", "no\0thing", "no\0thing*.jpg", "x" * 5000])
def test_a_source_that_does_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a.jpg")
    text = refusal(source)
    assert "does not exist or cannot be reached" in text
    assert "nothing was marked as removed; give a folder" in text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("file:///photos", r"is of an unknown kind.*known are s3://, gs://, az://, https://"),
        ("https://host/*.jpg", r"cannot be listed.*the web has no folders; give a .txt"),
        ("s3:///photos", "names no bucket or host"),
        ("s3://key:secret@bucket/photos", "URL of 'bucket' carries a user or password.*environment variables"),
        ("s3://bucket/a.jpg", "is a single image"),
    ],
)
def test_a_url_that_cannot_be_listed(source: str, text: str) -> None:
    assert re.search(text, refusal(source))


def test_a_single_image(tmp_path: Path) -> None:
    make(tmp_path, "a.JPG")
    assert "is a single image, and a source is a collection" in refusal(tmp_path / "a.JPG")
    assert "give its folder, or a .txt list" in refusal(tmp_path / "a.JPG")


@pytest.mark.parametrize("name", ["list.xlsx", "list", "pipe.txt"])
def test_a_file_that_is_no_list(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name) if name.startswith("pipe") else make(tmp_path, name)
    assert "is neither a folder nor a list that can be read" in refusal(tmp_path / name)
    assert "a regular file that ends in .txt, .csv, .parquet" in refusal(tmp_path / name)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert "is empty (no files at any depth), so there is nothing to do: its disk may not be mounted" in refusal(tmp_path)
    assert "Nothing was marked as removed" in refusal(tmp_path)


def test_a_folder_without_images(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.TXT", "c.raw", "sub/README", b"x.\xff", "._d.jpg")
    text = refusal(tmp_path)
    assert "holds no images but 6 other files (suffixes: '.txt', '._*', '.raw', none" in text
    assert "its disk may not be mounted. Nothing was marked as removed" in text


def test_a_folder_without_images_and_countless_suffixes(tmp_path: Path) -> None:
    make(tmp_path, *(f"slice.{i:04d}" for i in range(50)))
    text = refusal(tmp_path)
    assert "50 other files (suffixes: '...', " in text
    assert len(text) < 400


def test_a_folder_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "disk1").symlink_to("/mnt/not/mounted")
    assert "(folders that could not be read: 1, first 'disk1')" in refusal(tmp_path)


def test_a_root_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(path: bytes) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", faulty)
    with pytest.raises(UsageError, match=r"cannot be read \(Input/output error\), so nothing was listed.*disk is mounted"):
        list_collection(str(tmp_path))


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "folder.png/x")
    assert "*.png' matches no file, so there is nothing to do: its disk may not be mounted" in refusal(tmp_path / "*.png")
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "missing/*.jpg")
    assert "cannot be read (Not a directory)" in refusal(tmp_path / "a.jpg/*.jpg")
    assert "matches no file" in refusal(tmp_path / ("*" + "x" * 300))


@pytest.mark.parametrize(("name", "text"), [("list.txt", "# nothing\n\n"), ("list.txt", ""), ("list.csv", "path\n")])
def test_an_empty_list(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert "names no image, so there is nothing to do" in refusal(tmp_path / name)
    assert "Nothing was marked as removed" in refusal(tmp_path / name)


def test_a_list_of_fifos_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    assert "names no image" in refusal(tmp_path / "list.txt")


def test_a_list_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file;label\na.jpg;1\n")
    assert "has no column 'path' but ['file', 'label']" in refusal(tmp_path / "list.csv")
    (tmp_path / "empty.csv").touch()
    assert "has no column 'path' but []" in refusal(tmp_path / "empty.csv")
    pd.DataFrame({"file": ["a.jpg"], "label": 1}).to_parquet(tmp_path / "list.parquet")
    assert "has no column 'path' but ['file', 'label'], so nothing was listed" in refusal(tmp_path / "list.parquet")


def test_a_list_with_a_nul_byte(tmp_path: Path) -> None:
    for name, content in [("list.txt", b"# x\na.jpg\nb\0.jpg\n"), ("list.csv", b'path\n"a\n.jpg"\nb\0.jpg\n')]:
        (tmp_path / name).write_bytes(content)
        text = refusal(tmp_path / name)
        assert f"line {3 if name.endswith('txt') else 4} of list" in text
        assert "has a NUL byte, which no file name can have" in text
    (tmp_path / "utf16.txt").write_bytes("a.jpg\n".encode("utf-16"))
    assert "line 1 of list" in refusal(tmp_path / "utf16.txt")
    pd.DataFrame({"path": ["a.jpg", "b\0.jpg"]}).to_parquet(tmp_path / "list.parquet")
    assert "line 2 of list" in refusal(tmp_path / "list.parquet")


def test_a_list_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('path\n"a.jpg\nb.jpg\n')
    assert "cannot be read (unexpected end of data)" in refusal(tmp_path / "list.csv")
    (tmp_path / "long.csv").write_text("path\n" + "a" * 200_000 + "\n")
    assert "cannot be read (field larger than field limit" in refusal(tmp_path / "long.csv")
    (tmp_path / "list.parquet").write_text("no parquet at all")
    assert "cannot be read (Parquet magic bytes not found" in refusal(tmp_path / "list.parquet")
    pd.DataFrame({"path": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    assert "cannot be read (Unsupported cast from int64 to binary" in refusal(tmp_path / "numbers.parquet")


def test_a_parquet_list_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "list.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = refusal(tmp_path / "list.parquet")
    assert "needs pyarrow, which is not installed (" in found
    assert found.endswith("nothing was done; pip install 'featuremaps[parquet]', or give a .csv list")


# one source, however it is written

NAMES = st.sampled_from(["a", "raw", "b c", ".h", "é", "x1"])
FILES = st.lists(
    st.tuples(st.lists(NAMES, max_size=3), st.sampled_from(["a.jpg", "b.png", ".h.jpg", "raw"])), min_size=1, max_size=8
)
PARTS = st.lists(
    st.sampled_from(["**", "*", "a", "raw", "?*", "[a-r]*", "*.jpg", "a.*", ".h", ".*", "*a*"]), min_size=1, max_size=4
)


def spellings(folder: Path, pattern: str) -> dict[str, str]:
    """One pattern below ``folder``, as one would write it there, which is the current folder."""
    (folder.parent / "link").unlink(missing_ok=True)
    (folder.parent / "link").symlink_to(folder)
    job = folder / "job.yaml"
    job.write_text(json.dumps({"source": pattern, "store": "../f.zarr"}), encoding="utf-8")
    from_job = load_job(job).source
    job.unlink()
    return {
        "relative": pattern,
        "absolute": f"{folder}/{pattern}",
        "dot": f"./{pattern}",
        "trailing slash": f"{pattern}/",
        "doubled slashes": f"//{folder}//{pattern.replace('/', '//')}",
        "dots within": pattern.replace("/", "/./"),
        "from another folder": f"../{folder.name}/{pattern}",
        "braces": f"{{{pattern},{folder}/{pattern}}}",
        "home folder": f"~/{folder.name}/{pattern}",
        "job file": from_job,
        "through a link": f"../link/{pattern}",
        "as a store remembers it": absolute_source(pattern),
    }


def listed_files(source: str) -> list[str]:
    """Absolute paths of what a source lists; none where it is refused."""
    try:
        listing = list_collection(source)
    except UsageError:
        return []
    return [os.fsdecode(absolute_path(listing.root, path)) for path in listing.paths]


@settings(deadline=None, max_examples=60)
@given(files=FILES, parts=PARTS.filter(lambda parts: patterns.is_pattern("/".join(parts))))
@example(files=[([], "a.jpg"), (["raw"], "a.jpg"), (["x1", "raw", "a"], "a.jpg")], parts=["**", "raw", "**"])
@example(files=[([], "a.jpg"), (["x1"], "raw")], parts=["*", "**"])
def test_a_source_lists_what_the_standard_library_finds_however_it_is_written(files: list, parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        folder = Path(home) / "photos"
        make(folder, "keep/me.txt")
        for above, name in files:
            with contextlib.suppress(OSError):  # one name as a folder and a file
                make(folder, "/".join([*above, name]))
        patch.chdir(folder)
        patch.setenv("HOME", home)
        pattern = "/".join(parts)
        found = {os.path.realpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        for spelling, source in spellings(folder, pattern).items():
            listed = listed_files(source)
            assert {os.path.realpath(path) for path in listed} == found, spelling
            assert len(set(listed)) == len(listed)
            assert listed == sorted(listed, key=lambda path: os.fsencode(path).split(b"/"))
            assert is_same_source(source, pattern), spelling
            assert is_same_source(absolute_source(pattern), source), spelling
            assert not is_same_source(source, f"{pattern}x")
            if "link" not in spelling:
                assert absolute_source(source) == absolute_source(pattern), spelling


def test_a_relative_pattern_that_begins_and_ends_with_any_depth_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "raw/a.jpg", "x/raw/b.jpg", "x/raw/y/c.jpg", "x/d.jpg")
    monkeypatch.chdir(tmp_path)
    assert list_collection("**/raw/**").paths == ["raw/a.jpg", "x/raw/b.jpg", "x/raw/y/c.jpg"]
    assert list_collection("**/raw/**") == list_collection(f"{tmp_path}/**/raw/**")
    assert not walks_into("**/raw/**", str(tmp_path), "/elsewhere")
    assert walks_into("**/raw/**", str(tmp_path), f"{tmp_path}/x/f.zarr")
    assert not walks_into("raw/*", str(tmp_path / "raw"), f"{tmp_path}/raw/f.zarr/deep")


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("photos [2024]", "photos [2024]"),
        ("photos [2024]", "photos [2024]/*.jpg"),
        ("photos [2024]", "photos [[]2024]/*.jpg"),
        ("photos [2024]", "photos [[]2024[]]/*.{jpg,png}"),
        ("photos [2024]", "photos [[]2024]"),
        ("photos [2024]/in [1]", "photos [2024]/in [1]/**"),
        ("a {b,c}", "a {b,c}/*.jpg"),
        ("a {b,c}", "a {b,c}"),
        ("a {b,c}", "a [{]b,c}/*.jpg"),
        ("{b}", "{b}/*.jpg"),
        ("a*b?", "a*b?"),
        ("a*b?", "a[*]b[?]/*.jpg"),
        ("~", "./~/*.jpg"),
    ],
)
def test_a_folder_whose_name_has_wildcards_is_named_as_it_is_or_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, source: str
) -> None:
    make(tmp_path, f"{folder}/a.jpg", "photos 2/b.jpg", "aXbY/b.jpg", "a b/b.jpg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(json.dumps({"source": source, "store": "f.zarr"}))
    for spelled in (
        source,
        f"{tmp_path}/{source.removeprefix('./')}",
        load_job(tmp_path / "job.yaml").source,
        absolute_source(source),
    ):
        listing = list_collection(spelled)
        assert (listing.root, listing.paths) == (str(tmp_path / folder), ["a.jpg"]), spelled
        assert is_same_source(spelled, source)
    monkeypatch.chdir(tmp_path / folder)  # whose own name is no pattern
    assert list_collection("*.jpg").root == str(tmp_path / folder)
    (tmp_path / folder / "job.yaml").write_text("{source: '*.jpg', store: f.zarr}")
    assert list_collection(load_job(tmp_path / folder / "job.yaml").source).root == str(tmp_path / folder)


def test_what_is_no_name_is_still_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, "set[1]/a.jpg", "set1/b.jpg", "set2/c.jpg")
    assert list_collection(f"{tmp_path}/set[12]/*").paths == ["set1/b.jpg", "set2/c.jpg"]
    assert list_collection(f"{tmp_path}/set[1]/*").paths == ["a.jpg"]  # where there is a folder of that name
    assert list_collection(f"{tmp_path}/set*/*").paths == ["set1/b.jpg", "set2/c.jpg", "set[1]/a.jpg"]


@pytest.mark.parametrize(
    ("pattern", "typed"),
    [
        ("photos [2024]/*.jpg", "type 'photos [[]2024]/*.jpg'"),
        ("photos [2024]/[[]/*.jpg", "type 'photos [[]2024]/[[]/*.jpg'"),
        ("*.{jpg}", r"braces need a comma, as in *.{jpg,png}"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed in refusal(pattern)
    assert "type" not in refusal("x*.png").split("nothing to do")[0]


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("*.{jpg,png}", ["*.jpg", "*.png"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("{a,{b,c}d}e", ["ae", "bde", "cde"]),
        ("a{,b}", ["a", "ab"]),
        ("{a{b,c}}", ["{ab}", "{ac}"]),
        ("{a{b,c}", ["{ab", "{ac"]),
        ("{x}{a,b}", ["{x}a", "{x}b"]),
        ("{a/b,c}/*", ["a/b/*", "c/*"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{1..7..3}", ["1", "4", "7"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{}", ["{}"]),
        ("a,b}", ["a,b}"]),
    ],
)
def test_braces_are_expanded_as_a_shell_expands_them(text: str, expanded: list[str]) -> None:
    done = subprocess.run(["bash", "-fc", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True)
    assert patterns.expand(text) == expanded == done.stdout.splitlines()


def test_braces_list_each_image_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.jpg", "a/2.png", "b/1.jpg", "b/3.gif")
    monkeypatch.chdir(tmp_path)
    assert list_collection("*/*.{jpg,png}").paths == ["a/1.jpg", "a/2.png", "b/1.jpg"]
    assert list_collection("{b,a,*}/*.jpg").paths == ["a/1.jpg", "b/1.jpg"]
    assert list_collection("{a,b}/*.jpg").root == str(tmp_path)
    assert absolute_source("*/*.{jpg,png}") == absolute_source("./{*/*.png,*/*.jpg}") == f"{tmp_path}/{{*/*.jpg,*/*.png}}"
    assert "folder '" + str(tmp_path / "c") + "' cannot be read" in refusal("{a,c}/*.jpg")  # its disk may not be mounted
    assert "stand for 2500 patterns, more than 1000" in refusal("{1..50}{1..50}")
    assert "stands for 5000 names, more than 1000" in refusal("{1..5000}")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "photos/a.jpg", "photos/~odd/b.jpg", "photos/~nobody-of-that-name/c.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "photos")
    (tmp_path / "list.txt").write_text("photos/a.jpg")
    for source in ("~/photos/*.jpg", "~/photos", "~/list.txt", "{~/photos/*.jpg,/nowhere*}"):
        assert list_collection(source).paths[0] in {"a.jpg", "photos/a.jpg", f"{tmp_path}/photos/a.jpg".lstrip("/")}
    assert list_collection("~nobody-of-that-name").paths == ["c.jpg"]  # as a shell leaves it
    assert "there is no user of that name" in refusal("~nobody-else-of-that-name/x")
    assert place("~/f.zarr") == tmp_path / "f.zarr"


def test_another_spelling_of_a_pattern_is_not_another_pattern(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "link").symlink_to("a")
    assert is_same_source(f"{tmp_path}/link/*.jpg", f"{tmp_path}/a/*.jpg")
    assert is_same_source(f"{tmp_path}/link", f"{tmp_path}/a/")
    assert not is_same_source(f"{tmp_path}/a/*.jpg", f"{tmp_path}/b/*.jpg")
    assert not is_same_source(f"{tmp_path}/a", f"{tmp_path}/a/*.jpg")
    assert not is_same_source(f"{tmp_path}/a", "s3://bucket/a")
    assert is_same_source("s3://bucket/{a,b}/*.jpg", "s3://bucket/{b,a}/*.jpg/")
    assert not is_same_source("s3://bucket/a", "s3://other/a")


@pytest.mark.parametrize(
    ("key", "root", "found"),
    [
        ("**/raw/**", "", ["raw/a.jpg", "x/raw/b.jpg"]),
        ("x/*/*.{jpg,png}", "x", ["raw/b.jpg"]),
        ("{raw,x/raw}/*.jpg", "", ["raw/a.jpg", "x/raw/b.jpg"]),
        ("in [[]1]", "in [1]", ["c.jpg"]),
        ("in [[]1]/*.jpg", "in [1]", ["c.jpg"]),
        ("in [1]/*.jpg", None, r"type 'in \[\[\]1\]/\*.jpg'"),
        ("x", "x", ["raw/b.jpg"]),
    ],
)
def test_patterns_of_a_bucket_are_the_same(
    monkeypatch: pytest.MonkeyPatch, key: str, root: str | None, found: list[str] | str
) -> None:
    keys = ["raw/a.jpg", "x/raw/b.jpg", "in [1]/c.jpg"]
    meta = Meta(1, datetime.now(UTC), "e")

    def walk(
        url: Url,
    ) -> list[tuple[str, Meta]]:  # in place of a server's listing; tests/system/services/test_buckets.py has a real one
        above = f"{url.key}/" if url.key else ""
        return [(name[len(above) :], meta) for name in keys if name.startswith(above)]

    monkeypatch.setattr(Url, "walk", walk)
    if root is None:
        assert re.search(str(found), refusal(f"s3://bucket/{key}"))
        return
    listing = list_collection(f"s3://bucket/{key}")
    assert (listing.root, listing.paths) == (f"s3://bucket/{root}".rstrip("/"), found)
    assert walks_into(f"s3://bucket/{key}", listing.root, f"{listing.root}/raw") == (key != "in [[]1]/*.jpg")
