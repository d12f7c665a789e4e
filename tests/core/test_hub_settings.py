from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import SettingsError
from appliance.core.hub_settings import HubSettings, hub_setting_fields, load_hub_settings
from appliance.core.settings import load_settings


def test_the_defaults_are_settings_that_load(tmp_path: Path) -> None:
    settings, effective = load_hub_settings(flags={"data_dir": str(tmp_path)})
    assert settings.database_path == tmp_path / "hub.db"
    assert [each.name for each in effective] == list(hub_setting_fields())
    assert {each.origin for each in effective} == {"default", "flag --data"}


def test_the_box_and_the_hub_each_read_their_own_variables() -> None:
    environment = {"APPLIANCE_PORT": "8081", "APPLIANCE_HUB_PORT": "8091", "APPLIANCE_HUB_CONFIG": "hub.toml"}
    assert load_hub_settings(environment=environment)[0].port == 8091
    assert load_settings(environment=environment)[0].port == 8081


def test_a_file_says_what_the_hub_is_to_be(tmp_path: Path) -> None:
    file = tmp_path / "hub.toml"
    file.write_text('data_dir = "here"\napproval = "automatic"\ntelemetry_days = 7\n', encoding="utf-8")
    settings, _ = load_hub_settings(config_file=file, environment={"APPLIANCE_HUB_TELEMETRY_DAYS": "9"})
    assert settings == HubSettings(data_dir=tmp_path / "here", approval="automatic", telemetry_days=9)
    assert settings.authority_path.parent == settings.certificates_dir


@pytest.mark.parametrize(
    ("environment", "param"),
    [
        ({"APPLIANCE_HUB_PROT": "1"}, "prot"),
        ({"APPLIANCE_HUB_MODEL": "x"}, "model"),
        ({"APPLIANCE_HUB_PORT": "66000"}, "port"),
        ({"APPLIANCE_HUB_HOST": "example.com"}, "host"),
        ({"APPLIANCE_HUB_APPROVAL": "maybe"}, "approval"),
        ({"APPLIANCE_HUB_TLS_KEY": "/key.pem"}, "tls_certificate"),
        ({"APPLIANCE_HUB_BROKER_HOST": ""}, "broker_host"),
        ({"APPLIANCE_HUB_BROKER_PORT": "0"}, "broker_port"),
        ({"APPLIANCE_HUB_SHARED_GROUP": "a/b"}, "shared_group"),
        ({"APPLIANCE_HUB_SHARED_GROUP": "#"}, "shared_group"),
        ({"APPLIANCE_HUB_DATA_DIR": ""}, "data_dir"),
        ({"APPLIANCE_HUB_QUESTIONS_PER_MINUTE": "0"}, "questions_per_minute"),
    ],
)
def test_a_setting_that_will_not_do_is_refused_by_name(environment: Mapping[str, str], param: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_hub_settings(environment=environment)
    assert refused.value.param == param


@pytest.mark.parametrize("name", sorted(hub_setting_fields()))
def test_no_setting_of_the_hub_takes_nonsense(name: str) -> None:
    flags: dict[str, Any] = {name: "\x00"}
    with pytest.raises(SettingsError):
        load_hub_settings(flags=flags)
