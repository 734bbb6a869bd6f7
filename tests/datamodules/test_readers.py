import json
import sys

import pytest

from heliostat.datamodules.readers import find_files, read_rows

PAIR = ["sentence1", "sentence2", "score"]
ROWS = [('A man, "it\'s" said.', "Überall ist\tes still", "3.5"), ("two\nlines", "x", "0")]


def values(*args, **kwargs):
    return [row.values for row in read_rows(*args, **kwargs)]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


class TestFormats:
    def test_txt(self, tmp_path):
        file = write(tmp_path / "a.txt", "first line\n\n  third\r\nlast, without an end")
        rows = list(read_rows(file, ["sentence"]))
        assert [row.values for row in rows] == [("first line",), ("",), ("  third",), ("last, without an end",)]
        assert rows[2].where == f"{file}, line 3"

    def test_csv_by_name(self, tmp_path):
        text = (
            'id,score,sentence2,sentence1\n1,3.5,Überall ist\tes still,"A man, ""it\'s"" said."\n\n2,0,x,"two\nlines"\n'
        )
        file = write(tmp_path / "a.csv", text)
        rows = list(read_rows(str(file), PAIR))
        assert [row.values for row in rows] == ROWS
        assert [row.number for row in rows] == [2, 4]

    def test_csv_by_position(self, tmp_path):
        file = write(tmp_path / "a.csv", "x,a,b,1\ny,c,d,2\n")
        assert values(file, [1, 2, 3]) == [("a", "b", "1"), ("c", "d", "2")]

    def test_tsv_does_not_know_quotes(self, tmp_path):
        file = write(tmp_path / "a.tsv", 'sentence1\tsentence2\tscore\n"Stray quote\the said "no"\t2\nb\tc\t1\n')
        assert values(file, PAIR) == [('"Stray quote', 'he said "no"', "2"), ("b", "c", "1")]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_json_lines(self, tmp_path, name):
        file = write(tmp_path / name, '{"score": 1.5, "sentence1": "ü", "sentence2": null}\n\n')
        assert values(file, PAIR) == [("ü", None, 1.5)]

    def test_json_array(self, tmp_path):
        file = write(tmp_path / "a.json", json.dumps([{"s": "a", "t": 1}, {"s": "b"}], indent=1))
        rows = list(read_rows(file, ["s"]))
        assert [row.values for row in rows] == [("a",), ("b",)]
        assert rows[1].where == f"{file}, row 2"

    def test_parquet(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pa.table({"x": [1, 2, 3], "sentence": ["a", None, "c"], "score": [0.5, 1.0, 1.5]})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        rows = list(read_rows(tmp_path / "a.parquet", ["score", "sentence"]))
        assert [row.values for row in rows] == [(0.5, "a"), (1.0, None), (1.5, "c")]
        assert rows[2].where == f"{tmp_path / 'a.parquet'}, row 3"
        with pytest.raises(ValueError, match=r"no column 'text'; it has \['x', 'sentence', 'score'\]"):
            values(tmp_path / "a.parquet", ["text"])

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
    def test_encoding(self, tmp_path, encoding):
        file = write(tmp_path / "a.csv", "sentence\nfür\n", encoding)
        assert values(file, ["sentence"], encoding=encoding) == [("für",)]

    def test_byte_order_mark(self, tmp_path):
        file = write(tmp_path / "a.csv", "sentence\nfür\n", "utf-8-sig")
        assert values(file, ["sentence"]) == [("für",)]

    def test_several_files_and_patterns(self, tmp_path):
        (tmp_path / "deep").mkdir()
        for name in ("2.txt", "1.txt", "deep/3.txt", "odd[1].txt"):
            write(tmp_path / name, name)
        assert values(f"{tmp_path}/?.txt", ["s"]) == [("1.txt",), ("2.txt",)]
        assert len(find_files(f"{tmp_path}/**/*.txt")) == 4
        assert values([f"{tmp_path}/deep/*.txt", tmp_path / "1.txt"], ["s"]) == [("deep/3.txt",), ("1.txt",)]
        assert values(f"{tmp_path}/odd[1].txt", ["s"]) == [("odd[1].txt",)]

    def test_reads_lazily(self, tmp_path):
        file = write(tmp_path / "a.jsonl", '{"s": "a"}\nbroken\n')
        assert next(read_rows(file, ["s"])).values == ("a",)


class TestErrors:
    def test_missing_file_names_its_neighbours(self, tmp_path):
        write(tmp_path / "train.csv", "")
        with pytest.raises(FileNotFoundError, match=r"no file .*trian\.csv.*near names in .*: train\.csv"):
            read_rows(tmp_path / "trian.csv", ["s"])

    def test_missing_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no directory '.*nowhere'"):
            read_rows(tmp_path / "nowhere" / "a.txt", ["s"])

    def test_pattern_without_match(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no file matches the pattern '.*\*\.csv'"):
            read_rows(f"{tmp_path}/*.csv", ["s"])

    def test_no_files(self):
        with pytest.raises(ValueError, match="no files given"):
            read_rows([], ["s"])

    def test_unknown_suffix(self, tmp_path):
        with pytest.raises(ValueError, match=r"cannot read '.*a\.xlsx': its name must end in one of \.txt, \.csv"):
            read_rows(write(tmp_path / "a.xlsx", ""), ["s"])

    @pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "json"])
    def test_wrong_encoding(self, tmp_path, suffix):
        line = {"jsonl": '{"s": "für"}', "json": '{"s": "für"}'}.get(suffix, "für")
        good = line.replace("für", "fur")
        content = "s\n" + "fur\n" * 5000 if suffix in ("txt", "csv") else (good + "\n") * 5001
        file = write(tmp_path / f"a.{suffix}", content + line, "latin-1")
        column = line.index("ü") + 1
        with pytest.raises(
            ValueError,
            match=rf"a\.{suffix}, line 5002, byte {column} of the line: 0xfc is not utf-8 .*encoding='latin-1'",
        ):
            values(file, ["s"])

    def test_csv_without_the_column(self, tmp_path):
        file = write(tmp_path / "a.csv", "a man,a woman,2.5\n")
        with pytest.raises(
            ValueError,
            match=r"no column 'sentence1'; its first line has \['a man', 'a woman', '2.5'\].* give positions: "
            r"pair_columns=\[0, 1, 2\]",
        ):
            values(file, PAIR, argument="pair_columns")

    def test_csv_with_a_short_row(self, tmp_path):
        file = write(tmp_path / "a.csv", "a,b,1\nc,d\n")
        with pytest.raises(
            ValueError, match=r"a\.csv, line 2: columns=\[0, 1, 2\] needs 3 fields, got 2: \['c', 'd'\]"
        ):
            values(file, [0, 1, 2])

    def test_csv_with_an_open_quote(self, tmp_path):
        file = write(tmp_path / "a.csv", 's\nfine\n"open\nmore\n')
        with pytest.raises(ValueError, match=r"a\.csv, line 3: .*quote that is not closed"):
            values(file, ["s"])

    def test_malformed_json(self, tmp_path):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 3: malformed JSON .*not json"):
            values(write(tmp_path / "a.jsonl", '{"s": "a"}\n\nnot json\n'), ["s"])
        with pytest.raises(ValueError, match=r"a\.json, line 2: malformed JSON"):
            values(write(tmp_path / "a.json", '[{"s": "a"},\n}]'), ["s"])

    def test_json_without_the_column(self, tmp_path):
        file = write(tmp_path / "a.jsonl", '{"s": "a"}\n{"t": "a", "u": 1}\n')
        with pytest.raises(ValueError, match=r"line 2: no 's'; the row has \['t', 'u'\]. .* in sentence_column"):
            values(file, ["s"], argument="sentence_column")
        with pytest.raises(ValueError, match=r"line 1: expected an object with the names \['s'\], got \['a'\]"):
            values(write(tmp_path / "b.jsonl", '["a"]'), ["s"])

    def test_columns(self, tmp_path):
        text, lines = write(tmp_path / "a.txt", "a"), write(tmp_path / "a.jsonl", "{}")
        with pytest.raises(ValueError, match=r"one text a line, but columns=.* asks for 3 columns"):
            values(text, PAIR)
        with pytest.raises(ValueError, match=r"columns of a \.jsonl file have names; got columns=\[0\]"):
            values(lines, [0])
        with pytest.raises(ValueError, match=r"all names .* or all positions"):
            values(text, [0, "s"])
        with pytest.raises(ValueError, match=r"all names .* or all positions"):
            values(text, [])
        with pytest.raises(ValueError, match="positions count from 0, got -1"):
            values(text, [-1])

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ModuleNotFoundError, match=r"needs the package `pyarrow`.*pip install 'heliostat\[data\]'"):
            values(write(tmp_path / "a.parquet", ""), ["s"])
