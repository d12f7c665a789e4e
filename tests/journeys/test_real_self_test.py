"""The self-test on the real default chat model, with golden inputs out of metadata that a hub has signed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.releases import Criteria, GoldenInput
from appliance.core.settings import Settings
from appliance.core.wishes import SelfTestReport
from appliance.registry.versions import open_registry
from appliance.serving.self_test import run_self_test
from appliance.store.database import Database
from tests.fleet.trusting import Device, HandClock, Hub

pytestmark = [pytest.mark.journey, pytest.mark.timeout(120)]

MODEL = "smollm2-135m-instruct"
GOLDEN = (
    GoldenInput(prompt="The capital of France is", expected=" Paris", max_tokens=2),
    GoldenInput(prompt="One, two, three, four, five, six,", expected=" seven", max_tokens=2),
)


def signed_criteria(folder: Path, criteria: Criteria) -> Criteria:
    """Return the criteria as a device has them from its hub: signed there, and verified here."""

    async def verified() -> Criteria:
        hub = Hub(folder / "hub", HandClock())
        device = Device(folder, hub)
        try:
            await device.enrol()
            release = await device.trust.verified_release(hub.job(hub.release(criteria=criteria)))
            return release.criteria
        finally:
            device.database.close()

    return asyncio.run(verified())


def registered(data: Path) -> list[tuple[str, int]]:
    """Return the models of a data folder, and the sizes of their files."""
    settings = replace(Settings(), data_dir=data)
    database = Database(settings.database_path, read_only=True)
    try:
        models = open_registry(settings, database).list()
        return [(each.full_name, file.path.stat().st_size) for each in models for file in each.files]
    finally:
        database.close()


def tried(data: Path, criteria: Criteria) -> SelfTestReport:
    settings = replace(Settings(), data_dir=data, context_cells=512, max_sequences=2)
    database = Database(settings.database_path, read_only=True)
    try:
        model = open_registry(settings, database).resolve(MODEL)
        return asyncio.run(run_self_test(settings, model, criteria))
    finally:
        database.close()


def test_the_default_model_passes_its_signed_golden_inputs_within_its_budgets(real_data: Path, tmp_path: Path) -> None:
    criteria = signed_criteria(tmp_path, Criteria(GOLDEN, least_tokens_per_second=0.5, most_memory=2**30))
    assert criteria.golden == GOLDEN
    report = tried(real_data, criteria)
    assert report.passed, report.detail
    assert report.tokens_per_second > 0.5
    assert 2**26 < report.memory <= 2**30


def test_the_default_model_fails_signed_golden_inputs_of_another_model(real_data: Path, tmp_path: Path) -> None:
    wrong = (GOLDEN[0], replace_expected(GOLDEN[1], " Paris"))
    before = registered(real_data)
    report = tried(real_data, signed_criteria(tmp_path, Criteria(wrong)))
    assert (report.passed, report.code) == (False, "wrong_answer")
    assert "' Paris' was expected" in report.detail
    assert registered(real_data) == before, "a failed test changes nothing"


def replace_expected(golden: GoldenInput, expected: str) -> GoldenInput:
    return GoldenInput(prompt=golden.prompt, expected=expected, max_tokens=golden.max_tokens)
