"""What is printed where nobody watches: into files and pipes."""

from rich.table import Table

from lowprec.display import make_console


def test_a_table_in_a_log_file_keeps_its_paths_whole(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = "runs/sweep/adapter.r=8,optimizer.learning_rate=0.0001"
    table = Table("held-out loss", "trained tok/s", "peak VRAM GiB", "folder")
    table.add_row("1.905", "1,534", "12.34", path)
    make_console().print(table)
    assert path in capsys.readouterr().out


def test_columns_decides_where_it_is_set(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert make_console().width == 50
