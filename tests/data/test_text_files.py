"""Lines and rows: nothing of a file is lost or changed, and what cannot be read says where."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe.config import UserError
from diffmoe.data.text_files import read_csv, read_json_lines, read_lines

BOM = "\ufeff"
ENDS = ("\n", "\r\n", "\r")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every test writes anew."""
    return tmp_path_factory.mktemp("text") / "captions.csv"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return [row for _, row in read_csv(path, "image")]


# --- Lines ---


@pytest.mark.parametrize("start", ["", BOM])
@pytest.mark.parametrize("last", ["", "\n", "\n\n \n"])
@pytest.mark.parametrize("end", ENDS)
def test_every_line_is_read_however_the_file_begins_and_ends(path: Path, start: str, last: str, end: str) -> None:
    text = start + f"one\ntwo\u2028still two\x0c\x85\n\n 四{last}".replace("\n", end)
    assert list(read_lines(write(path, text))) == [(1, "one"), (2, "two\u2028still two\x0c\x85"), (4, " 四")]


@pytest.mark.parametrize("end", ENDS)
def test_what_is_no_utf_8_text_is_named_by_its_line(path: Path, end: str) -> None:
    for start in ("", BOM):
        path.write_bytes(f"{start}a{end}é{end}".encode() + b"\xe9")
        with pytest.raises(UserError, match=r"captions\.csv line 3 is not UTF-8: save the file as UTF-8"):
            list(read_lines(path))
    for read in (read_lines, read_json_lines, lambda path: read_csv(path, "image")):
        with pytest.raises(UserError, match=r"captions\.csv line 2 has a NUL byte: save the file as UTF-8"):
            list(read(write(path, f"image,caption{end}0.png,a\0b{end}")))
    with pytest.raises(UserError, match=r"nowhere: No such file"):
        list(read_lines(path.with_name("nowhere")))


def test_json_lines_that_will_not_do(path: Path) -> None:
    assert list(read_json_lines(write(path, '{"a": 1}\n\n{"a": "x\\ny"}'))) == [(1, {"a": 1}), (3, {"a": "x\ny"})]
    with pytest.raises(UserError, match=r"line 1 is not valid JSON: it has the key 'caption' more than once"):
        list(read_json_lines(write(path, '{"image": "0.png", "caption": "a", "caption": "b"}')))


# --- Tables ---

CELLS = st.text(st.sampled_from('ab ,"\n\r\u2028é.'), max_size=8)


@given(
    table=st.lists(st.tuples(CELLS, CELLS).filter(lambda cells: any(map(str.strip, cells))), min_size=1, max_size=5),
    end=st.sampled_from(ENDS),
    bom=st.booleans(),
    ended=st.booleans(),
)
def test_what_a_csv_writer_writes_is_read(
    path: Path, table: list[tuple[str, str]], end: str, bom: bool, ended: bool
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("image", "caption"), *table])
    text = BOM * bom + (file.getvalue() if ended else file.getvalue().removesuffix(end))
    for row, (image, caption) in zip(rows(write(path, text)), table, strict=True):
        for found, written in ((row["image"], image), (row["caption"], caption)):
            one_line = not {"\n", "\r"} & set(written)
            assert found == written if one_line else found.split() == written.split()
            assert not {"\n", "\r"} & set(found)


@pytest.mark.parametrize("end", ENDS)
def test_quotes_and_line_breaks_of_a_caption(path: Path, end: str) -> None:
    lines = [
        *("image, caption", '0.png,a 5" pipe', '1.png,"a ""so called"" dog"', '2.png,"a dog', "runs, and", "", 'sits"'),
        *('3.png, "half" a dog', '4.png,""', "", ",", "5.png,"),
    ]
    found = list(read_csv(write(path, end.join(lines)), "image"))
    assert found == [
        (2, {"image": "0.png", "caption": 'a 5" pipe'}),
        (3, {"image": "1.png", "caption": 'a "so called" dog'}),
        (4, {"image": "2.png", "caption": "a dog runs, and sits"}),
        (8, {"image": "3.png", "caption": ' "half" a dog'}),
        (9, {"image": "4.png", "caption": ""}),
        (12, {"image": "5.png", "caption": ""}),
    ]


@pytest.mark.parametrize("columns", ["image caption split", "caption image", "caption split image"])
@pytest.mark.parametrize("end", ENDS)
def test_a_stray_quote_never_takes_in_another_row(path: Path, columns: str, end: str) -> None:
    """Whether nothing closes it, or a caption that opens, ends or holds a quote: by the end of its row or later."""
    for first in range(4):
        for last in range(first, 5):
            for closing in ('"a cat', 'a 5"', '"a, b"', "a cat"):
                captions = [f"w{number}" for number in range(5)]
                captions[first] = '"a so called dog' if first < last else '"a so" called dog'
                if first < last:
                    captions[last] = closing
                table = [
                    [{"image": f"{number}.png", "caption": caption, "split": "train"}[name] for name in columns.split()]
                    for number, caption in enumerate(captions)
                ]
                write(path, end.join([",".join(row) for row in [columns.split(), *table]]))
                with pytest.raises(UserError, match=rf"captions\.csv line {first + 2} ") as caught:
                    rows(path)
                assert 'end the cell with a quote, and double those inside ("a ""so called"" dog")' in str(caught.value)
                assert "\n" not in str(caught.value)


def test_a_stray_quote_behind_a_caption_of_two_lines_is_named_by_its_own(path: Path) -> None:
    write(path, 'image,caption_0,caption_1\n0.png,"a dog\nruns","a cat\n1.png,w,w\n')
    with pytest.raises(UserError, match=r"captions\.csv line 3 has a cell that opens with a quote but does not end"):
        rows(path)


def test_pictures_without_an_ending_are_known_by_their_files(path: Path) -> None:
    path.with_name("picture").touch()
    with pytest.raises(UserError, match=r"captions\.csv line 2 opens a quote that takes in the row of line 3"):
        rows(write(path, 'image,caption\n0.png,"a dog\npicture,a 5"\n'))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_head_tells_what_separates_cells(path: Path, separator: str) -> None:
    caption = "a".join({",", ";", "\t"} - {separator})
    table = [("image", "caption", "split"), ("0.png", caption, "x"), ("1.png", f'"a{separator} ""b""\nc"', "x")]
    assert rows(write(path, "\n".join(map(separator.join, table)))) == [
        {"image": "0.png", "caption": caption, "split": "x"},
        {"image": "1.png", "caption": f'a{separator} "b" c', "split": "x"},
    ]
    with pytest.raises(UserError, match=r"line 2 has more cells than the head: quote captions with (comma|semi|tab)"):
        rows(write(path, "image,caption\n0.png,a,b\n".replace(",", separator)))
    with pytest.raises(UserError, match=r"line 3 has a cell that opens with a quote but does not end with one"):
        rows(write(path, 'image,caption\n0.png,"a"\n1.png,"a" dog\n'.replace(",", separator)))
    with pytest.raises(UserError, match=r"line 2 opens a quote that takes in the row of line 3"):
        rows(write(path, 'caption,image\n"a,0.png\nb",1.png\n'.replace(",", separator)))


def test_heads_that_will_not_do(path: Path) -> None:
    with pytest.raises(UserError, match=r"captions\.csv line 1 has the column caption more than once"):
        rows(write(path, "image,caption, caption\n0.png,a,b\n"))
    with pytest.raises(UserError, match=r"captions\.csv line 1 opens a quote that takes in the row of line 2"):
        rows(write(path, 'image,caption,"note\n0.png,a,"\n1.png,b,\n'))
    assert rows(write(path, ",image,caption\n0,0.png,a\n")) == [{"": "0", "image": "0.png", "caption": "a"}]  # pandas
    assert rows(write(path, "")) == []


def test_a_cell_that_is_too_long_for_csv(path: Path) -> None:
    write(path, f'image,caption\n0.png,a\n1.png,"{"word " * 30_000}"\n')
    with pytest.raises(UserError, match=r"line 3 cannot be read \(field larger than field limit \(131072\)\)"):
        rows(path)
    write(path, 'image,caption\n0.png,a\n1.png,"a so called dog\n' + "2.png,a cat\n" * 20_000)
    with pytest.raises(UserError, match=r"captions\.csv line 3 has a cell that opens with a quote"):
        rows(path)
