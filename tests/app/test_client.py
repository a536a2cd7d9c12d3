"""What other programs get from the page through gradio_client, and what they cannot get."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

pytest.importorskip("gradio_client", reason="gradio is not there: pip install 'diff-moe[app]'")

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffmoe.app.page import drawn

NAMES = ("cat", "dog", "cow")


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[Client]:
    client = Client(served, verbose=False)
    yield client
    client.close()


class TestClient:
    """Of `gradio_client`: what other programs get."""

    def test_the_endpoints_and_what_they_take(self, client):
        endpoints = client.view_api(return_format="dict")["named_endpoints"]
        names = {name: [p["parameter_name"] for p in told["parameters"]] for name, told in endpoints.items()}
        assert names == {
            "/predict": ["picture", "model", "language"],
            "/zero_shot": ["picture", "labels", "model", "language"],
            "/caption": ["picture", "model", "language"],
            "/retrieve": ["text", "picture", "folder", "model", "language"],
            "/routing": ["picture", "block", "model", "language"],
            "/attention": ["picture", "patch", "model", "language"],
        }

    def test_predict(self, client, answers, picture):
        found = client.predict(handle_file(picture), "classifier.pth", api_name="/predict")
        wanted = answers.predict(picture, "classifier.pth")
        assert {row["label"]: row["confidence"] for row in found["confidences"]} == pytest.approx(wanted, rel=1e-4)
        assert found["label"] == max(wanted, key=lambda name: wanted[name])

    def test_zero_shot(self, client, answers, picture):
        found = client.predict(handle_file(picture), "a cat\nb", "classifier.pth", api_name="/zero_shot")
        wanted = answers.zero_shot(picture, "a cat\nb", "classifier.pth")
        assert {row["label"]: row["confidence"] for row in found["confidences"]} == pytest.approx(wanted, rel=1e-4)

    def test_caption(self, client, answers, picture):
        found = client.predict(handle_file(picture), "captioner.pth", api_name="/caption")
        assert found == answers.caption(picture, "captioner.pth")

    def test_retrieve(self, client, answers):
        found = client.predict("a cat", None, "1", "classifier.pth", api_name="/retrieve")
        assert [row["caption"] for row in found] == [
            text for _, text in answers.retrieve("a cat", None, "1", "classifier.pth")
        ]
        with Image.open(found[0]["image"]) as image:
            assert image.size == (30, 20)

    def test_routing_and_attention(self, client, answers, picture):
        path = client.predict(handle_file(picture), 2, "classifier.pth", api_name="/routing")
        with Image.open(path) as image:
            assert image.tobytes() == drawn(answers.routing(picture, 2, "classifier.pth")).tobytes()
        path, seen = client.predict(handle_file(picture), 5, "classifier.pth", api_name="/attention")
        with Image.open(path) as image:
            assert image.tobytes() == drawn(answers.attention(picture, 5, "classifier.pth")).tobytes()
        with Image.open(seen) as image:
            assert image.tobytes() == answers.seen(picture, 5, "classifier.pth").tobytes()

    def test_a_mistake_is_a_sentence_in_the_language_asked_for(self, client, folder, picture):
        for language, sentence in (("en", "text.png is not a picture: it must be"), ("zh", "text.png 不是图片")):
            (folder / "text.png").write_text("no picture")
            with pytest.raises(AppError, match=sentence):
                client.predict(handle_file(str(folder / "text.png")), "classifier.pth", language, api_name="/predict")
        assert client.predict(handle_file(picture), "classifier.pth", api_name="/predict")["label"] in NAMES

    @pytest.mark.parametrize("path", ["{folder}/secret/key.png", "{folder}/gallery/0/0.jpg", "/etc/passwd"])
    def test_files_are_not_served(self, client, folder, path):
        response = httpx.get(f"{client.src}gradio_api/file={path.format(folder=folder)}")
        assert response.status_code == 403

    def test_a_file_name_cannot_be_markup(self, client, folder):
        (folder / "<b>.png").write_text("no picture")
        with pytest.raises(AppError) as caught:
            client.predict("a", None, "<img src=x>", "classifier.pth", api_name="/retrieve")
        assert "&lt;img src=x&gt; is no folder" in str(caught.value)

    def test_a_file_that_is_too_large_is_refused_while_it_comes(self, client, picture):
        response = httpx.post(f"{client.src}gradio_api/upload", files={"files": ("large.png", b"x" * 20_000_001)})
        assert response.status_code == 413
        assert client.predict(handle_file(picture), "classifier.pth", api_name="/predict")["label"] in NAMES
