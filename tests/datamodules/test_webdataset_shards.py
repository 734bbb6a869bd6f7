import gzip
import io
import json
import os
import pickle
import tarfile
import warnings

import pytest

from heliostat.datamodules import webdataset_shards
from heliostat.datamodules.captions import Captions, caption_texts
from heliostat.datamodules.webdataset_shards import expand_braces, find_shards, index_shards


def shard(path, members):
    """Write a tar file; a member that is no bytes is a ready TarInfo."""
    with tarfile.open(path, "w") as out:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                out.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return str(path)


def samples(first=0, number=4):
    """Members of samples with a picture that is none, of a different length each, and a .txt."""
    return {
        name: content
        for i in range(first, first + number)
        for name, content in ((f"{i:04d}.jpg", bytes([i]) * (i + 600)), (f"{i:04d}.txt", f"number {i}\n".encode()))
    }


def index(source, caption_columns=("caption",), label_column=None, cache_dir=None):
    return index_shards(
        source, "pairs", caption_columns=caption_columns, label_column=label_column, cache_dir=cache_dir
    )


class TestCaptions:
    ROWS = (["a", "Ünï ☃"], ["b"], [], ["c" * 500, "d", "e"])

    def test_packed(self):
        captions = Captions(self.ROWS)
        assert len(captions) == 4
        assert list(captions) == list(self.ROWS)
        assert captions[1] == ["b"]
        assert captions.total == 6
        for row in (4, -1):
            with pytest.raises(IndexError):
                captions[row]
        assert list(Captions()) == []

    def test_joined(self):
        states = [Captions(rows).state_dict() for rows in (self.ROWS, [], [["x"], ["y", "z"]])]
        assert list(Captions.join(states)) == [*self.ROWS, ["x"], ["y", "z"]]
        assert list(Captions.join([])) == []

    def test_texts(self):
        assert caption_texts([" a ", ["b", "a", ""], None, " \n"], "here") == ["a", "b"]
        assert caption_texts(["half \ud83d"], "here") == ["half ?"]
        for value in (3, ["a", 3], {"a": 1}):
            with pytest.raises(ValueError, match="here: a caption must be text or a list of texts, got"):
                caption_texts([value], "here")


class TestFinding:
    def test_braces(self):
        assert expand_braces("a.tar") == ["a.tar"]
        assert expand_braces("s/{008..011}.tar") == ["s/008.tar", "s/009.tar", "s/010.tar", "s/011.tar"]
        assert expand_braces("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
        assert expand_braces("{x}.tar") == ["{x}.tar"]

    def test_patterns(self, tmp_path):
        paths = [shard(tmp_path / f"{i}.tar", {}) for i in range(3)]
        assert find_shards(f"{tmp_path}/*.tar", "pairs") == paths
        assert find_shards(f"{tmp_path}/{{0..2}}.tar", "pairs") == paths
        assert find_shards([paths[2], f"{tmp_path}/{{0..1}}.tar"], "pairs") == [paths[2], *paths[:2]]
        with pytest.raises(FileNotFoundError, match=r"pairs: there is no shard '.*/3.tar'"):
            find_shards(f"{tmp_path}/{{0..3}}.tar", "pairs")
        with pytest.raises(FileNotFoundError, match=r"there is no shard '.*/x\*.tar'"):
            find_shards(f"{tmp_path}/x*.tar", "pairs")
        with pytest.raises(ValueError, match=r"1 shards are named more than once, such as '.*/1.tar'"):
            find_shards([paths[1], f"{tmp_path}/*.tar"], "pairs")
        with pytest.raises(ValueError, match="pairs is an empty list"):
            find_shards([], "pairs")


class TestIndex:
    def test_places_and_captions(self, tmp_path):
        paths = [shard(tmp_path / f"{k}.tar", samples(4 * k)) for k in range(3)]
        found = index(paths)
        assert list(found.captions) == [[f"number {i}"] for i in range(12)]
        assert [found.pictures.content(i) for i in range(12)] == [bytes([i]) * (i + 600) for i in range(12)]
        assert found.pictures.where(5) == f"{paths[1]}/0005.jpg"
        assert found.class_names is None
        copied = pickle.loads(pickle.dumps(found.pictures))  # noqa: S301
        assert copied.content(7) == found.pictures.content(7)

    def test_members_of_a_sample_stand_anywhere(self, tmp_path):
        long = "folder/" + "x" * 200  # a name that takes a header of its own
        members = {
            "b/1.json": json.dumps({"caption": ["one", "uno"], "kind": 7}).encode(),
            f"{long}.txt": b"long",
            "._1.jpg": b"of macOS",
            "b/1.seg.png": b"a mask",
            "b/1.WEBP": b"picture",
            f"{long}.png": b"long picture",
            "a/1.jpeg": b"another",
            "a/1.cls": b"9",
            "a/1.txt": b"a",
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = index(shard(tmp_path / "a.tar", members), label_column="kind")
        assert list(found.captions) == [["one", "uno"], ["long"], ["a"]]
        assert [found.pictures.content(i) for i in range(3)] == [b"picture", b"long picture", b"another"]
        assert found.class_names == ["7", "", "9"]

    def test_json_and_txt(self, tmp_path):
        record = {"caption": "short", "long": "a long one"}
        path = shard(tmp_path / "a.tar", {"1.jpg": b"x", "1.txt": b"text", "1.json": json.dumps(record).encode()})
        assert index(path).captions[0] == ["short"]
        assert index(path, ["long", "txt"]).captions[0] == ["a long one", "text"]
        with pytest.raises(ValueError, match=r"none of 1 samples .*1 without a caption.*have \['caption', 'long'\]"):
            index(path, ["lang"])

    def test_incomplete_samples_are_counted(self, tmp_path):
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        members = samples(0, 2) | {
            "a.jpg": b"x",
            "b.txt": b"x",
            "c.jpg": b"x",
            "c.txt": b"  ",
            "d.jpg": b"x",
            "d.json": b"{broken",
            "e.jpg": b"x",
            "e.txt": b"\xff\xfe",
            "9.jpg": link,
        }
        message = (
            r"pairs: passed over 5 of 7 samples: 1 links, 2 without a caption, 1 without a picture, 2 whose text is "
            "malformed"
        )
        with pytest.warns(UserWarning, match=message) as warned:
            found = index(shard(tmp_path / "a.tar", members))
        assert len(warned) == 1
        assert len(found.captions) == 2

    def test_nothing_usable(self, tmp_path):
        with pytest.raises(ValueError, match="the shards are empty.*there are no .json members"):
            index(shard(tmp_path / "a.tar", {}))
        with pytest.raises(ValueError, match=r"none of 1 samples has both .*1 without a picture"):
            index(shard(tmp_path / "a.tar", {"1.gif": b"x", "1.txt": b"x"}))

    @pytest.mark.parametrize("name", ["../1.jpg", "/etc/1.jpg", "a/../../1.jpg"])
    def test_names_that_lead_out(self, tmp_path, name):
        with pytest.raises(ValueError, match="holds the name .* which leads out of it"):
            index(shard(tmp_path / "a.tar", samples() | {name: b"x"}))

    def test_the_same_member_twice(self, tmp_path):
        with pytest.raises(ValueError, match="holds '1.JPG' twice"):
            index(shard(tmp_path / "a.tar", {"1.jpg": b"x", "1.txt": b"x", "1.JPG": b"y"}))

    def test_compressed(self, tmp_path):
        plain = shard(tmp_path / "a.tar", samples())
        (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
        (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar.gz").read_bytes())
        for name in ("b.tar.gz", "c.tar"):
            with pytest.raises(ValueError, match=rf"{name}' is compressed \(gzip\).*decompress it to a plain .tar"):
                index([plain, str(tmp_path / name)])

    def test_no_tar(self, tmp_path):
        (tmp_path / "a.tar").write_bytes(b"no tar file at all" * 100)
        with pytest.raises(ValueError, match=r"pairs: '.*a.tar' is no tar file"):
            index(str(tmp_path / "a.tar"))


class TestCutOff:
    @pytest.fixture
    def content(self, tmp_path):
        return open(shard(tmp_path / "whole.tar", samples()), "rb").read()

    def test_every_length(self, tmp_path, content):
        """Wherever a shard ends too early: what is whole is used, and it is said."""
        whole = str(tmp_path / "whole.tar")
        part = tmp_path / "part.tar"
        counts = set()
        # a picture takes 512 + 1024 bytes and a text 512 + 512: 2,560 a sample
        for length in [*range(0, 4 * 2560, 256), 2560 * 2 + 700, 2560 * 4 - 1, 2560 * 4]:
            part.write_bytes(content[:length])
            with pytest.warns(UserWarning, match="1 shards are cut off: .*part.tar"):
                found = index([whole, str(part)])
            expected = length // 2560 + (length % 2560 >= 2560 - 512 + len("number 1\n"))
            assert len(found.captions) == 4 + expected
            for i in range(expected):
                assert found.pictures.content(4 + i) == found.pictures.content(i)
            counts.add(expected)
        assert counts == {0, 1, 2, 3, 4}

    def test_alone(self, tmp_path, content):
        (tmp_path / "part.tar").write_bytes(content[:1000])
        with pytest.raises(ValueError, match=r"none of 0 samples .*1 shards are cut off: .*part.tar"):
            index(str(tmp_path / "part.tar"))

    def test_spoilt_header(self, tmp_path, content):
        spoilt = bytearray(content)
        spoilt[2560 * 2 : 2560 * 2 + 512] = b"x" * 512
        (tmp_path / "part.tar").write_bytes(spoilt)
        with pytest.warns(UserWarning, match="1 shards are cut off"):
            assert len(index(str(tmp_path / "part.tar")).captions) == 2

    def test_while_training(self, tmp_path, content):
        found = index(str(tmp_path / "whole.tar"))
        os.truncate(tmp_path / "whole.tar", 2560 * 3 + 600)
        with pytest.raises(OSError, match="shorter since it was indexed"):
            found.pictures.content(3)
        os.remove(tmp_path / "whole.tar")
        with pytest.raises(FileNotFoundError):
            found.pictures.content(0)
        assert found.pictures.where(0).endswith("whole.tar/byte 512")


class TestSavedIndex:
    def test_kept_and_not_used_when_stale(self, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        path = shard(tmp_path / "a.tar", samples())
        first = index(path, cache_dir=cache)
        original = webdataset_shards._index
        monkeypatch.setattr(webdataset_shards, "_index", None)  # not to be called
        again = index(path, cache_dir=cache)
        assert list(again.captions) == list(first.captions)
        assert again.pictures.content(3) == first.pictures.content(3)
        monkeypatch.setattr(webdataset_shards, "_index", original)

        status = os.stat(path)
        changed = {name: content.replace(b"number", b"NUMBER") for name, content in samples().items()}
        shard(path, changed)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert os.stat(path).st_size == status.st_size
        assert index(path, cache_dir=cache).captions[0] == ["NUMBER 0"]
        shard(path, samples(5, 1))
        assert list(index(path, cache_dir=cache).captions) == [["number 5"]]
        assert not list(cache.rglob("*.tmp"))

    @pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x"])
    def test_made_anew_if_damaged(self, tmp_path, damage):
        path = shard(tmp_path / "a.tar", samples())
        index(path, cache_dir=tmp_path / "cache")
        (file,) = (tmp_path / "cache").rglob("*.pt")
        file.write_bytes(damage(file.read_bytes()))
        with pytest.warns(UserWarning, match=r"the index of '.*a.tar' in .*\.pt is damaged .*, and made anew"):
            found = index(path, cache_dir=tmp_path / "cache")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = index(path, cache_dir=tmp_path / "cache")
        assert list(again.captions) == list(found.captions) == [[f"number {i}"] for i in range(4)]

    def test_belongs_to_the_columns(self, tmp_path):
        record = {"caption": "short", "long": "a long one", "kind": "k"}
        path = shard(tmp_path / "a.tar", {"1.jpg": b"x", "1.json": json.dumps(record).encode()})
        for columns, label, expected in (("caption", None, "short"), ("long", None, "a long one")):
            assert index(path, [columns], label, tmp_path / "cache").captions[0] == [expected]
        assert index(path, label_column="kind", cache_dir=tmp_path / "cache").class_names == ["k"]

    def test_warnings_are_kept_too(self, tmp_path):
        path = shard(tmp_path / "a.tar", samples() | {"x.jpg": b"x"})
        for _ in range(2):
            with pytest.warns(UserWarning, match="passed over 1 of 5 samples: 1 without a caption"):
                index(path, cache_dir=tmp_path / "cache")

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        path = shard(tmp_path / "a.tar", samples())
        with pytest.warns(UserWarning, match=r"the index of '.*a.tar' cannot be kept in cache_dir"):
            assert len(index(path, cache_dir=tmp_path / "file").captions) == 4
