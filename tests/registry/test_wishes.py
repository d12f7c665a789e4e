from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import ApplianceError, ConflictError, NotFoundError
from appliance.core.releases import Criteria, GoldenInput
from appliance.core.wishes import Soak, Wish
from appliance.registry.blobs import Blobs
from appliance.registry.install import import_model
from appliance.registry.versions import Registry
from appliance.registry.wishes import GUARD, Wishes
from appliance.store.database import Database
from appliance.store.migrations import MIGRATIONS
from tests.registry.models import TinyModel
from tests.tiny_gguf import write_tiny_llama

SOAK = Soak(seconds=5, requests=3)


@pytest.fixture
def wishes(registry: Registry, tmp_path: Path, tiny: TinyModel) -> Wishes:
    """Return the wishes of a box with `tiny:1` and `tiny:2`."""
    import_model(tiny.path, registry, name="tiny")
    import_model(write_tiny_llama(tmp_path / "b.gguf", seed=1), registry, name="tiny")
    return Wishes(registry._database, registry)


def add(registry: Registry, folder: Path, seed: int) -> None:
    import_model(write_tiny_llama(folder / f"{seed}.gguf", seed=seed), registry, name="tiny")


def audit(wishes: Wishes) -> list[tuple[str, str, dict[str, Any]]]:
    def select(connection: Any) -> list[Any]:
        rows = connection.execute("SELECT actor, action, detail FROM audit WHERE action LIKE 'wish.%' ORDER BY id")
        return [(row["actor"], row["action"], json.loads(row["detail"])) for row in rows]

    return wishes._database.read(select)


def test_a_name_means_what_is_wished_for_and_full_names_what_they_say(wishes: Wishes, registry: Registry) -> None:
    assert registry.resolve("tiny").version == "2"
    wish = wishes.activate("tiny:1", origin="me", soak=None)
    assert (wish.version, wish.previous, wish.state) == ("1", "2", "confirmed")
    assert registry.resolve("tiny").version == "1"
    assert registry.resolve("tiny:2").version == "2"
    wishes.roll_back("tiny", origin="me", reason="no good")
    assert registry.resolve("tiny").version == "2"


def test_a_model_pulled_after_a_wish_is_not_meant(wishes: Wishes, registry: Registry, tmp_path: Path) -> None:
    wishes.activate("tiny:2", origin="me", soak=None)
    add(registry, tmp_path, 3)
    assert registry.resolve("tiny").version == "2"
    assert registry.resolve("tiny:3").version == "3"


def test_a_version_registered_aside_is_not_meant(registry: Registry, tmp_path: Path, wishes: Wishes) -> None:
    from dataclasses import replace

    third = replace(registry.resolve("tiny:2"), version="3")
    registry.register(third, "a job", aside=True)
    assert registry.resolve("tiny").version == "2"
    wish = wishes.activate("tiny:3", origin="a job", soak=SOAK)
    assert (wish.previous, wish.state) == ("2", "trial")
    registry.register(replace(third, name="new"), "a job", aside=True)
    assert registry.resolve("new").version == "3"
    assert wishes.find("new") is None


def test_another_process_sees_a_wish_at_its_next_question(
    wishes: Wishes, registry: Registry, tmp_path: Path, blobs: Blobs
) -> None:
    with closing(Database(tmp_path / "data" / "appliance.db")) as other:
        elsewhere = Registry(other, blobs)
        assert elsewhere.resolve("tiny").version == "2"
        wishes.activate("tiny:1", origin="me", soak=SOAK)
        assert elsewhere.resolve("tiny").version == "1"
        assert elsewhere.wishes()["tiny"] == wishes.find("tiny")


def test_each_change_has_its_row_in_the_audit_and_a_repetition_none(wishes: Wishes) -> None:
    for _ in range(2):
        wishes.activate("tiny:1", origin="key-1", soak=SOAK)
    for _ in range(2):
        wishes.roll_back("tiny", code="soak_errors", reason="3 of 9")
    for _ in range(2):
        wishes.confirm("tiny", "1")
    wishes.withdraw("tiny", origin="key-2")
    assert audit(wishes) == [
        ("key-1", "wish.activate", {"version": "1", "previous": "2", "state": "trial"}),
        (GUARD, "wish.roll_back", {"version": "1", "meant": "2", "code": "soak_errors", "reason": "3 of 9"}),
        ("key-2", "wish.withdraw", {}),
    ]


def test_what_a_trial_is_held_against_survives(wishes: Wishes) -> None:
    criteria = Criteria(golden=(GoldenInput(prompt="a", expected="b"),), most_error_rate=0.2)
    wishes.activate("tiny:1", origin="me", soak=SOAK, criteria=criteria)
    wishes.note("tiny", "1", "switched", baseline=0.25)
    terms = wishes.terms("tiny")
    assert terms is not None
    assert (terms.soak, terms.criteria, terms.baseline) == (SOAK, criteria, 0.25)
    wish = wishes.find("tiny")
    assert wish is not None
    assert (wish.serving, wish.fact) == ("1", "switched")
    assert wishes.terms("nobody") is None
    wishes.note("nobody", "1", "nothing to note it beside")
    assert wishes.find("nobody") is None


def test_a_late_confirmation_of_another_version_changes_nothing(wishes: Wishes) -> None:
    wishes.activate("tiny:1", origin="me", soak=SOAK)
    assert wishes.confirm("tiny", "2").state == "trial"
    assert wishes.confirm("tiny", "1").state == "confirmed"


def test_the_third_start_goes_back_and_says_so(wishes: Wishes, registry: Registry) -> None:
    wishes.activate("tiny:1", origin="me", soak=SOAK)
    assert wishes.begin_boot() == []
    assert wishes.begin_boot() == []
    [wish] = wishes.begin_boot()
    assert (wish.state, wish.code) == ("rolled_back", "crashed")
    assert registry.resolve("tiny").version == "2"
    assert wishes.begin_boot() == []


def test_orderly_stops_do_not_add_up(wishes: Wishes) -> None:
    wishes.activate("tiny:1", origin="me", soak=SOAK)
    for _ in range(5):
        assert wishes.begin_boot() == []
        wishes.end_boot()
    wishes.end_boot()
    assert [action for _, action, _ in audit(wishes)].count("wish.stop") == 5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda wishes: wishes.activate("tiny:7", origin="me", soak=None), "model_not_found"),
        (lambda wishes: wishes.activate("tiny", origin="me", soak=None), "model_not_found"),
        (lambda wishes: wishes.activate("\ud800:1", origin="me", soak=None), "model_not_found"),
        (lambda wishes: wishes.roll_back("nobody", origin="me", reason=""), "no_wish"),
        (lambda wishes: wishes.confirm("nobody", "1"), "no_wish"),
        (lambda wishes: wishes.withdraw("nobody", origin="me"), "no_wish"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_changes(
    wishes: Wishes, change: Callable[[Wishes], Any], code: str
) -> None:
    with pytest.raises(NotFoundError) as refusal:
        change(wishes)
    assert refusal.value.code == code
    assert wishes.all() == {}
    assert audit(wishes) == []


def test_without_a_version_before_only_the_box_itself_goes_back(registry: Registry, tiny: TinyModel) -> None:
    import_model(tiny.path, registry, name="tiny")
    wishes = Wishes(registry._database, registry)
    wishes.activate("tiny:1", origin="me", soak=SOAK)
    with pytest.raises(NotFoundError, match="no version of tiny before 1"):
        wishes.roll_back("tiny", origin="me", reason="try")
    assert wishes.roll_back("tiny", code="not_loadable", reason="damaged").meant is None
    with pytest.raises(NotFoundError):
        registry.resolve("tiny")
    assert registry.resolve("tiny:1").version == "1"


def test_a_wish_on_trial_is_not_withdrawn(wishes: Wishes) -> None:
    wishes.activate("tiny:1", origin="me", soak=SOAK)
    with pytest.raises(ConflictError, match="on trial"):
        wishes.withdraw("tiny", origin="me")


def test_what_a_wish_needs_is_not_removed(wishes: Wishes, registry: Registry, tmp_path: Path) -> None:
    add(registry, tmp_path, 3)
    wishes.activate("tiny:2", origin="me", soak=SOAK)
    for needed in ("tiny:2", "tiny:3"):
        with pytest.raises(ConflictError, match="nothing was removed") as refusal:
            registry.remove(needed)
        assert "appliance models activate" in refusal.value.advice
    registry.remove("tiny:1")
    wishes.roll_back("tiny", origin="me", reason="no good")
    registry.remove("tiny:2")
    assert registry.resolve("tiny").version == "3"
    registry.remove("tiny:3")
    assert wishes.all() == {}


def test_a_wish_for_what_was_removed_all_the_same_counts_as_none(wishes: Wishes, registry: Registry) -> None:
    wishes.activate("tiny:1", origin="me", soak=SOAK)
    wishes._database.write_blocking(lambda connection: connection.execute("DELETE FROM models WHERE version = '1'"))
    assert registry.resolve("tiny").version == "2"


def test_of_two_wishes_at_once_one_is_refused(wishes: Wishes, registry: Registry, tmp_path: Path) -> None:
    def wish(full_name: str) -> Wish | ApplianceError:
        with closing(Database(tmp_path / "data" / "appliance.db")) as database:
            other = Wishes(database, Registry(database, registry.blobs))
            try:
                return other.activate(full_name, origin="me", soak=SOAK)
            except ConflictError as error:
                return error

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(wish, ["tiny:1", "tiny:2"]))
    [refused] = [each for each in answers if isinstance(each, ConflictError)]
    [granted] = [each for each in answers if isinstance(each, Wish)]
    assert refused.code == "trial_in_progress"
    assert wishes.find("tiny") == granted


def test_a_database_from_before_wishes_can_be_looked_at(tmp_path: Path, blobs: Blobs) -> None:
    path = tmp_path / "old.db"
    Database(path, migrations=MIGRATIONS[:5]).close()
    with closing(Database(path, read_only=True)) as database:
        assert Registry(database, blobs).wishes() == {}
