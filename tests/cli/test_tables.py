from __future__ import annotations

import pytest

from appliance.cli.tables import print_table


def test_a_table_goes_into_a_pipe_without_colours_or_cut_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["Name", "State"], [["摄像头", "valid"], ["x" * 200, "bad"]], {"bad": "red"})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.replace("\n", "").replace(" ", "").count("x") == 200
    assert out.splitlines()[0].split() == ["Name", "State"]


def test_a_cell_cannot_drive_the_terminal_or_be_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["Name"], [["\x1b[31mred\n[bold]x[/bold]"]])
    assert "\\x1b[31mred\\n[bold]x[/bold]" in capsys.readouterr().out
