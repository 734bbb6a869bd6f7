import multiprocessing
import os
import pickle
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from heliostat.components import CachedTextEmbeddings, text_cache

pytest.importorskip("safetensors")

TEXTS = [f"text number {i}" for i in range(50)]


class Embed:
    """Two numbers a text that depend on it alone, and a record of what was asked."""

    def __init__(self, width=2, scale=1.0):
        self.width, self.scale, self.batches = width, scale, []

    def __call__(self, texts):
        self.batches.append(texts)
        rows = [[(sum(t.encode()) % 97 + i) * self.scale for i in range(self.width)] for t in texts]
        return torch.tensor(rows).requires_grad_()

    @property
    def embedded(self):
        return [text for batch in self.batches for text in batch]


@pytest.fixture
def cache(tmp_path):
    return CachedTextEmbeddings.build(TEXTS, Embed(), tmp_path, fingerprint="a", batch_size=7)


def test_embeddings_in_the_order_asked_for(cache):
    asked = [TEXTS[i] for i in (3, 41, 3, 0, 49)]
    embeddings = cache.lookup(asked)
    assert torch.equal(embeddings, Embed()(asked))
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad
    assert cache.lookup([]).shape == (0, 2)
    assert (len(cache), cache.dim, cache.fingerprint) == (50, 2, "a")


def test_each_text_is_embedded_once_in_batches(tmp_path):
    embed = Embed()
    texts = [*TEXTS[:10], *TEXTS[:10], *TEXTS[5:15], "", "\ud800", "é", "e\u0301"]
    cache = CachedTextEmbeddings.build(texts, _safe(embed), tmp_path, fingerprint="a", batch_size=4)
    assert embed.embedded == list(dict.fromkeys(texts))
    assert [len(batch) for batch in embed.batches] == [4, 4, 4, 4, 3]
    assert len(cache) == 19
    assert torch.equal(cache.lookup(texts), _safe(Embed())(texts))


def _safe(embed):
    """Lone surrogates have no UTF-8, and tokenizers fail on them; the cache does not mind."""

    def run(texts):
        embed.batches.append(texts)
        return Embed()([text.encode("utf-8", "surrogatepass").hex() for text in texts])

    return run


def test_reopened(cache, tmp_path):
    again = CachedTextEmbeddings.open(tmp_path, "a")
    assert torch.equal(again.lookup(TEXTS), cache.lookup(TEXTS))


def test_half_precision_takes_half_the_space(tmp_path):
    for dtype in ("float32", "float16"):
        CachedTextEmbeddings.build(TEXTS, Embed(512, 0.01), tmp_path, fingerprint="a", dtype=dtype)
    half, full = sorted(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path))
    assert 0.48 < half / full < 0.55
    rough = CachedTextEmbeddings.open(tmp_path, "a", dtype="float16").lookup(TEXTS)
    exact = CachedTextEmbeddings.open(tmp_path, "a").lookup(TEXTS)
    assert rough.dtype == torch.float32
    assert 0 < ((rough - exact) / exact.clamp(min=1e-3)).abs().max() < 5e-4
    assert torch.equal(exact, Embed(512, 0.01)(TEXTS))


def test_cache_of_another_model_is_not_used(cache, tmp_path):
    with pytest.raises(ValueError, match=r"holds no float32 embeddings with fingerprint 'b', but 1 files of another"):
        CachedTextEmbeddings.open(tmp_path, "b")
    with pytest.raises(ValueError, match=r"holds no float16 embeddings with fingerprint 'a', but 1 files of another"):
        CachedTextEmbeddings.open(tmp_path, "a", dtype="float16")
    with pytest.raises(ValueError, match=r"no float32 embeddings with fingerprint 'a'; make them by"):
        CachedTextEmbeddings.open(tmp_path / "nowhere", "a")
    embed = Embed(scale=2.0)
    other = CachedTextEmbeddings.get_or_build(TEXTS, embed, tmp_path, fingerprint="b")
    assert embed.embedded == TEXTS
    assert torch.equal(other.lookup(TEXTS), 2 * cache.lookup(TEXTS))  # both live in one folder
    # Not even under the other's name.
    os.replace(cache.files[0], other.files[0])
    with pytest.raises(ValueError, match="holds embeddings with fingerprint 'a', not 'b'"):
        CachedTextEmbeddings.open(tmp_path, "b")


def test_texts_that_are_not_there(cache):
    with pytest.raises(ValueError, match=r"2 of 4 texts are not in the cache .*'new one'.*get_or_build"):
        cache.lookup([TEXTS[0], "new one", "new two", TEXTS[1]])
    assert cache.missing(["new two", TEXTS[0], "new one", "new two"]) == ["new two", "new one"]
    assert cache.missing(TEXTS) == []


def test_only_what_is_missing_is_added(cache, tmp_path):
    embed = Embed()
    assert len(CachedTextEmbeddings.get_or_build(TEXTS, embed, tmp_path, fingerprint="a").files) == 1
    assert embed.batches == []
    texts = ["x", *TEXTS[:3], "y", "x"]
    more = CachedTextEmbeddings.get_or_build(texts, embed, tmp_path, fingerprint="a")
    assert embed.embedded == ["x", "y"]
    assert (len(more), len(more.files)) == (52, 2)
    assert torch.equal(more.lookup(texts + TEXTS), Embed()(texts + TEXTS))
    with pytest.raises(ValueError, match="2 of 3 texts"):
        cache.lookup(["x", "y", TEXTS[0]])  # opened before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_build(error, tmp_path):
    def embed(texts):
        if TEXTS[20] in texts:
            raise error
        return Embed()(texts)

    with pytest.raises(error):
        CachedTextEmbeddings.build(TEXTS, embed, tmp_path, fingerprint="a", batch_size=5)
    assert os.listdir(tmp_path) == []
    assert len(CachedTextEmbeddings.get_or_build(TEXTS, Embed(), tmp_path, fingerprint="a")) == 50


def _killed_while_building(folder):
    def embed(texts):
        if TEXTS[20] in texts:
            os._exit(1)
        return Embed()(texts)

    CachedTextEmbeddings.build(TEXTS, embed, folder, fingerprint="a", batch_size=5)


def test_killed_build(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed_while_building, args=(tmp_path,))
    process.start()
    process.join()
    assert [name.suffix for name in tmp_path.iterdir()] == [".tmp"]
    with pytest.raises(ValueError, match="holds no float32 embeddings"):
        CachedTextEmbeddings.open(tmp_path, "a")
    cache = CachedTextEmbeddings.get_or_build(TEXTS, Embed(), tmp_path, fingerprint="a")
    assert torch.equal(cache.lookup(TEXTS), Embed()(TEXTS))


def test_two_builds_at_once(tmp_path):
    barrier, results = threading.Barrier(2), []

    def build(texts):
        def embed(batch):
            barrier.wait()  # batch by batch, both files are open
            return Embed()(batch)

        results.append(CachedTextEmbeddings.build(texts, embed, tmp_path, fingerprint="a", batch_size=10))

    threads = [threading.Thread(target=build, args=(TEXTS,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for cache in results:
        assert torch.equal(cache.lookup(TEXTS), Embed()(TEXTS))
    assert len(os.listdir(tmp_path)) == 1


def test_damaged_file(cache, tmp_path):
    content = cache.files[0].read_bytes()
    for damaged in (content[:-3], b"", b"nonsense" * 10):
        cache.files[0].write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged; delete it"):
            CachedTextEmbeddings.open(tmp_path, "a")


def test_is_an_ordinary_safetensors_file(cache):
    from safetensors.torch import load_file

    tensors = load_file(cache.files[0])
    assert torch.equal(tensors["embeddings"], Embed()(TEXTS))  # in the order of the texts
    assert (tensors["first"].diff() >= 0).all()
    assert b"text number" not in cache.files[0].read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the files that are mapped")
def test_rows_are_mapped_not_read(tmp_path):
    texts = [str(i) for i in range(1000)]
    cache = CachedTextEmbeddings.build(texts, lambda t: torch.ones(len(t), 4096), tmp_path, fingerprint="a")
    rows = cache._tables[0].embeddings
    assert rows.untyped_storage().nbytes() >= 1000 * 4096 * 4
    with open("/proc/self/maps") as maps:
        assert str(cache.files[0]) in maps.read()
    # What another process writes to the file is seen: the numbers are not a copy.
    with open(cache.files[0], "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert cache.lookup(["999"])[0, -1] == 0
    cache.lookup(["999"]).fill_(7.0)
    assert cache.lookup(["999"])[0, 0] == 1


class Lookup(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return self.cache.lookup([TEXTS[index]])[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_workers(cache, context):
    loader = DataLoader(Lookup(cache), batch_size=10, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), Embed()(TEXTS))


def test_pickles_are_small_and_notice_a_change(cache, tmp_path):
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).lookup(TEXTS), cache.lookup(TEXTS))  # noqa: S301
    os.replace(CachedTextEmbeddings.build(TEXTS, Embed(), tmp_path, fingerprint="b").files[0], cache.files[0])
    with pytest.raises(ValueError, match="holds embeddings with fingerprint 'b', not 'a'"):
        pickle.loads(pickled)  # noqa: S301


def test_texts_that_share_half_of_their_hash(tmp_path, monkeypatch):
    real = text_cache._digests

    def digests(texts):
        hashes = real(texts)
        hashes[:, 0] %= 3
        return hashes

    monkeypatch.setattr(text_cache, "_digests", digests)
    cache = CachedTextEmbeddings.build(TEXTS + TEXTS, Embed(), tmp_path, fingerprint="a")
    assert len(cache) == 50
    assert torch.equal(cache.lookup(TEXTS[::-1]), Embed()(TEXTS[::-1]))
    assert cache.missing(["new", TEXTS[3], "other"]) == ["new", "other"]


def test_wrong_arguments(tmp_path):
    def build(texts=TEXTS, embed=None, **settings):
        settings = {"fingerprint": "a", "batch_size": 10, **settings}
        return CachedTextEmbeddings.build(texts, embed or Embed(), tmp_path, **settings)

    widths = iter([2, 3])
    for message, arguments in (
        ("fingerprint must not be empty", {"fingerprint": ""}),
        ("there is none to embed", {"texts": []}),
        ("texts must be a sequence of strings, got one string", {"texts": "abc"}),
        ("batch_size must be at least 1, got 0", {"batch_size": 0}),
        (r"dtype must be one of \('float32', 'float16'\), got 'bfloat16'", {"dtype": "bfloat16"}),
        (r"tensor \(10, d\) for 10 texts, got \(1, 2\)", {"embed": lambda t: torch.ones(1, 2)}),
        (r"tensor \(10, d\) for 10 texts, got list", {"embed": lambda t: [[1.0]] * 10}),
        (r"tensor \(10, 2\) for 10 texts, got \(10, 3\)", {"embed": lambda t: torch.ones(10, next(widths))}),
        (
            "1 embeddings that are NaN.*'text number 0'",
            {"embed": lambda t: torch.ones(10, 1).index_fill_(0, torch.tensor([0]), float("nan"))},
        ),
        (
            "10 embeddings .* out of the range of float16",
            {"embed": lambda t: torch.full((10, 1), 1e5), "dtype": "float16"},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build(**arguments)
    assert os.listdir(tmp_path) == []


def test_one_fingerprint_for_two_models_is_noticed(cache, tmp_path):
    with pytest.raises(
        ValueError, match=r"fingerprint 'a' stands for embeddings of width \d in .* and \d in .* delete both"
    ):
        CachedTextEmbeddings.get_or_build(["new"], Embed(3), tmp_path, fingerprint="a")
