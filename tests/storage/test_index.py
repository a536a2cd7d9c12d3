"""An index finds what a sort finds, comes back from its file as it was, and answers for no other model or gallery."""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from diffmoe.config import UserError
from diffmoe.storage.index import Index, gallery_fingerprint, model_fingerprint

NAMES = ("a.jpg", "猫 🐈.png", "new\nline", 'a "quote" \\', "no utf-8: \udcff")


def index(count: int = 5, width: int = 4, seed: int = 0) -> Index:
    embeddings = F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)
    items = tuple(NAMES[row % len(NAMES)] + str(row) for row in range(count))
    return Index(embeddings, items, "pictures", model="m" * 32, gallery="g" * 32)


class TestSearch:
    @settings(deadline=None, max_examples=50)
    @given(
        count=st.integers(1, 30),
        queries=st.integers(1, 5),
        top=st.integers(1, 40),
        coarse=st.booleans(),
        seed=st.integers(0, 10**6),
    )
    def test_equals_a_sort_of_all(self, count: int, queries: int, top: int, coarse: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gallery, asked = (torch.randn(n, 4, generator=generator) for n in (count, queries))
        if coarse:  # many equal similarities, exactly so
            gallery, asked = (torch.eye(4)[x.argmax(1)] for x in (gallery, asked))
        embeddings = F.normalize(gallery, dim=1)
        found = Index(embeddings, ("x",) * count, "texts", "m", "g").search(7 * asked, top)
        cosines = (F.normalize(7 * asked, dim=1) @ embeddings.T).tolist()
        for scores, rows, cosine in zip(*(x.tolist() for x in found), cosines, strict=True):
            wanted = sorted(range(count), key=lambda row, cosine=cosine: (-cosine[row], row))[:top]
            assert rows == wanted
            assert scores == [cosine[row] for row in wanted]

    def test_by_hand(self) -> None:
        gallery = Index(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]), ("a", "b", "c"), "texts", "m", "g")
        scores, rows = gallery.search(torch.tensor([[0, 5], [-2, 0]]), top=2)
        assert rows.tolist() == [[1, 0], [2, 1]]
        torch.testing.assert_close(scores, torch.tensor([[0.8, 0.0], [0.0, -0.6]]))
        assert (scores.dtype, rows.dtype) == (torch.float32, torch.int64)

    def test_every_item_finds_itself(self) -> None:
        made = index(50, 8)
        scores, rows = made.search(made.embeddings, top=1)
        assert rows[:, 0].tolist() == list(range(50))
        torch.testing.assert_close(scores, torch.ones(50, 1))

    def test_top_is_at_least_one(self) -> None:
        with pytest.raises(ValueError, match="top is 0"):
            index().search(torch.ones(1, 4), top=0)


class TestFile:
    def test_comes_back_as_it_was(self, tmp_path: Path) -> None:
        made = index()
        made.save(tmp_path / "new" / "index.safetensors")
        loaded = Index.load(tmp_path / "new" / "index.safetensors")
        assert torch.equal(loaded.embeddings, made.embeddings)
        for field in ("items", "kind", "model", "gallery"):
            assert getattr(loaded, field) == getattr(made, field)

    def test_a_slice_of_a_wider_tensor_too(self, tmp_path: Path) -> None:
        wide = index(6, 4)
        made = dataclasses.replace(wide, embeddings=wide.embeddings.T.contiguous().T)
        made.save(tmp_path / "index")
        assert torch.equal(Index.load(tmp_path / "index").embeddings, wide.embeddings)

    def test_overwrites_while_the_old_one_is_in_use(self, tmp_path: Path) -> None:
        old, new = index(seed=1), index(2000, seed=2)
        old.save(tmp_path / "index")
        loaded = Index.load(tmp_path / "index")
        new.save(tmp_path / "index")
        assert torch.equal(loaded.embeddings, old.embeddings)
        assert torch.equal(Index.load(tmp_path / "index").embeddings, new.embeddings)
        assert os.listdir(tmp_path) == ["index"]

    def test_a_full_disk_is_one_line_and_the_old_file_stays(self, tmp_path: Path) -> None:
        index().save(tmp_path / "index")
        before = (tmp_path / "index").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with pytest.raises(UserError, match=r"index cannot be written: ") as caught:
                index(1000).save(tmp_path / "index")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"index": before}

    @pytest.mark.parametrize("keep", [0, 4, 100, -200, -1])
    def test_a_truncated_file_is_one_line_that_names_it(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "cut.safetensors"
        index().save(path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=r"cut\.safetensors is damaged.*--overwrite") as caught:
            Index.load(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("damage", [b"\xff", b"]", b"1"])
    def test_items_that_are_not_what_was_written(self, tmp_path: Path, damage: bytes) -> None:
        path = tmp_path / "index"
        index().save(path)
        content = path.read_bytes()
        place = content.index(b'["a.jpg')
        path.write_bytes(content[:place] + damage + content[place + 1 :])
        with pytest.raises(UserError, match=r"index .*index is damaged"):
            Index.load(path)

    @pytest.mark.parametrize("value", [float("nan"), 0.0, 30.0])
    def test_numbers_that_are_not_what_was_written(self, tmp_path: Path, value: float) -> None:
        path = tmp_path / "index"
        made = index()
        made.save(path)
        content, damaged = path.read_bytes(), made.embeddings.clone()
        damaged[3] = value
        old, new = made.embeddings.numpy().tobytes(), damaged.numpy().tobytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match=r"index .*index is damaged"):
            Index.load(path)

    @pytest.mark.parametrize("metadata", [None, {"format": "diffmoe-index-0"}])
    def test_another_safetensors_file(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors", metadata)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or is not an index") as caught:
            Index.load(tmp_path / "model.safetensors")
        assert "\n" not in str(caught.value)

    def test_a_file_of_the_format_without_its_tensors(self, tmp_path: Path) -> None:
        save_file({"weight": torch.ones(3)}, tmp_path / "odd", {"format": "diffmoe-index-1"})
        with pytest.raises(UserError, match="odd is damaged"):
            Index.load(tmp_path / "odd")

    @pytest.mark.parametrize("name", ["missing", "."])
    def test_no_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError, match=r"index .* does not exist"):
            Index.load(tmp_path / name)


class TestCheck:
    def test_its_own_model_and_gallery_pass(self, tmp_path: Path) -> None:
        index().check(tmp_path / "index", model="m" * 32, gallery="g" * 32)

    @pytest.mark.parametrize(
        ("model", "gallery", "says"),
        [("x" * 32, "g" * 32, "by another model"), ("m" * 32, "x" * 32, "of other data")],
    )
    def test_others_are_refused(self, tmp_path: Path, model: str, gallery: str, says: str) -> None:
        with pytest.raises(UserError, match=rf"the\.index was made {says}: remove it or give --overwrite") as caught:
            index().check(tmp_path / "the.index", model=model, gallery=gallery)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"embeddings": torch.eye(5, 4, dtype=torch.float64)}, "float32"),
        ({"embeddings": torch.ones(5)}, r"\(5,\)"),
        ({"embeddings": torch.full((5, 4), 0.51)}, "unit norm"),
        ({"items": NAMES[:4]}, "5 embeddings for 4 items"),
        ({"embeddings": torch.empty(0, 4), "items": ()}, "0 embeddings for 0 items"),
        ({"kind": "sounds"}, "'sounds'"),
    ],
)
def test_fields_that_do_not_fit(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(index(), **changes)  # pyright: ignore[reportArgumentType]


class Weights(nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


class TestModelFingerprint:
    def test_equal_weights_have_one(self) -> None:
        scalar, none = torch.tensor(3), torch.empty(0, 2)
        first = Weights(w=torch.arange(6.0).reshape(2, 3), scalar=scalar, none=none)
        second = Weights(w=torch.arange(6.0).reshape(2, 3).T.contiguous().T, scalar=scalar, none=none)
        assert model_fingerprint(first) == model_fingerprint(second)
        assert len(model_fingerprint(first)) == 32
        assert set(model_fingerprint(first)) <= set("0123456789abcdef")

    def test_any_difference_shows(self) -> None:
        ones = torch.ones(4)
        nearly = ones.clone()
        nearly[2] = torch.nextafter(nearly[2], torch.tensor(2.0))
        models = [
            Weights(w=ones),
            Weights(w=nearly),
            Weights(v=ones),
            Weights(w=ones.reshape(2, 2)),
            Weights(w=ones.view(torch.int32)),
            Weights(w=ones, v=torch.empty(0)),
            Weights(w=ones[:2], v=ones[2:]),
        ]
        assert len({model_fingerprint(model) for model in models}) == len(models)

    def test_training_moves_it_and_gradients_do_not(self) -> None:
        model = nn.Linear(3, 2)
        before = model_fingerprint(model)
        model(torch.ones(1, 3)).sum().backward()
        assert model_fingerprint(model.eval()) == before
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert model_fingerprint(model) != before


class TestGalleryFingerprint:
    def test_items_and_their_order(self) -> None:
        galleries = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ['a", "b'], ["a"], list(NAMES)]
        assert len({gallery_fingerprint(items) for items in galleries}) == len(galleries)
        assert gallery_fingerprint(NAMES) == gallery_fingerprint(list(NAMES))

    def test_a_changed_file_shows(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(b"picture")
        os.utime(file, ns=(1, 1))
        before = gallery_fingerprint(["a.png"], [file])
        assert gallery_fingerprint(["a.png"], [file]) == before
        os.utime(file, ns=(1, 2))
        assert gallery_fingerprint(["a.png"], [file]) != before
        file.write_bytes(b"picture 2")
        os.utime(file, ns=(1, 1))
        assert gallery_fingerprint(["a.png"], [file]) != before

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"gone\.png cannot be read: No such file"):
            gallery_fingerprint(["gone.png"], [tmp_path / "gone.png"])
