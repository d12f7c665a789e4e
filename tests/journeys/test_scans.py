"""A scan and a picture are read by the models of the catalog, and found by what stands on them."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.journeys.processes import server_process
from tests.journeys.test_documents import found, until_taken_in
from tests.retrieval.documents import draw_page

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

LINES = ["PUMP MANUAL", "The zyxogram filter is changed after 4000 hours.", "Order number: AB-1042/7"]
SECOND = ["Second page", "Turn the frobnitz valve clockwise."]


@pytest.fixture
def copied_data(real_data: Path, tmp_path: Path) -> Path:
    """Return a data folder of the test's own with the catalog's models."""
    data = tmp_path / "data"
    shutil.copytree(real_data / "models", data / "models")
    names = (folder / "appliance.db" for folder in (real_data, data))
    source, copy = (sqlite3.connect(each) for each in names)
    with closing(source), closing(copy):
        source.backup(copy)
    return data


def test_scans_and_pictures_are_found_by_what_stands_on_them(copied_data: Path, tmp_path: Path) -> None:
    pages = [draw_page(LINES), draw_page(SECOND)]
    pages[0].save(tmp_path / "scan.pdf", save_all=True, append_images=pages[1:], resolution=150)
    draw_page(["Caution: the grimblat is hot."]).save(tmp_path / "sign.jpg", quality=70)
    environment = {"APPLIANCE_EMBEDDING_MODEL": "none"}
    with server_process(copied_data, tmp_path, "--model", "", environment=environment) as server:
        server.wait_until_ready()
        client = server.client()
        store = client.vector_stores.create(name="scans").id
        for name in ("scan.pdf", "sign.jpg"):
            file = client.files.create(file=tmp_path / name, purpose="assistants").id
            client.vector_stores.files.create(store, file_id=file)
        until_taken_in(server, store, 2)
        [(name, text, page, _)] = found(client, store, "zyxogram", "keyword")
        assert (name, page) == ("scan.pdf", 1)
        assert LINES[1] in text
        assert LINES[2] in text
        assert SECOND[1] in text
        [(name, text, page, _)] = found(client, store, "grimblat", "keyword")
        assert (name, text, page) == ("sign.jpg", "Caution: the grimblat is hot.", 1)
