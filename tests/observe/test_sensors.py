from __future__ import annotations

from pathlib import Path

import pytest

from appliance.observe.sensors import gpu_load, power_rails, temperatures

ORIN = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "46906\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
    "sys/class/thermal/thermal_zone3/type": "soc-thermal\n",
    "sys/class/hwmon/hwmon0/name": "pwmfan\n",
    "sys/class/hwmon/hwmon0/in1_label": "not a rail\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon3/in1_input": "5072\n",
    "sys/class/hwmon/hwmon3/curr1_input": "1296\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "5064\n",
    "sys/class/hwmon/hwmon3/curr2_input": "264\n",
    "sys/class/hwmon/hwmon3/in3_label": "VDD_SOC\n",
    "sys/class/hwmon/hwmon3/in3_input": "5064\n",
    "sys/class/hwmon/hwmon3/in7_label": "sum of shunt voltages\n",
    "sys/devices/platform/gpu.0/load": "333\n",
}
"""As a Jetson Orin Nano with JetPack 6 has them; `cv0` sleeps, `soc` and a rail's current cannot be read."""


def recorded(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_jetsons_zones_rails_and_load_are_read(tmp_path: Path) -> None:
    root = recorded(tmp_path, ORIN)
    assert temperatures(root) == {"cpu-thermal": 48.312, "gpu-thermal": 46.906}
    assert power_rails(root) == pytest.approx({"VDD_IN": 6.573, "VDD_CPU_GPU_CV": 1.337}, abs=0.001)
    assert gpu_load(root) == 0.333


def test_a_machine_without_sensors_has_none(tmp_path: Path) -> None:
    assert temperatures(tmp_path) == {}
    assert power_rails(tmp_path) == {}
    assert gpu_load(tmp_path) is None


def test_older_places_and_odd_values(tmp_path: Path) -> None:
    root = recorded(
        tmp_path,
        {
            "sys/devices/gpu.0/load": "5000\n",
            "sys/class/thermal/thermal_zone0/temp": "20000\n",
            "sys/class/thermal/thermal_zone1/type": "acpitz\n",
            "sys/class/thermal/thermal_zone1/temp": "30000\n",
            "sys/class/thermal/thermal_zone2/type": "acpitz\n",
            "sys/class/thermal/thermal_zone2/temp": "40000\n",
            "sys/class/thermal/thermal_zone4/type": "\x01\x02",
            "sys/class/thermal/thermal_zone4/temp": "1000",
        },
    )
    assert gpu_load(root) == 1.0
    assert temperatures(root) == {"thermal_zone0": 20.0, "acpitz": 30.0, "acpitz 2": 40.0, "unnamed": 1.0}


def test_this_machine_is_read_without_an_error() -> None:
    assert all(-100 < each < 300 for each in temperatures().values())
    assert all(each >= 0 for each in power_rails().values())
