"""Tables are shown in full where there is no terminal."""

import pytest
from rich.table import Table

from common.tables import console_for


def test_a_wide_table_is_not_cut_off_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("device", *(f"figure {number}" for number in range(20)))
    table.add_row("a-device-with-a-long-name", *(f"{number}.00 GiB" for number in range(20)))
    console_for(table).print(table)
    printed = capsys.readouterr().out
    assert "a-device-with-a-long-name" in printed
    assert all(f"{number}.00 GiB" in printed for number in range(20))
    assert "…" not in printed
