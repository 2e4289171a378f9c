"""`ibft lab demo` from end to end, with a few steps of everything."""

import json
from pathlib import Path

import pytest

from ibft.cli import main


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"lab demo --output_dir {tmp_path / 'demo'} --steps 3 --pretraining_steps 3"
    assert main(command.split()) == 0
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["base, not fine-tuned", "SFT", "IB-FT"]
    assert rows[1]["held_out_loss"] != rows[0]["held_out_loss"] != rows[2]["held_out_loss"]
    assert rows[1]["kl_nats"] is None and rows[2]["kl_nats"] > 0
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "SFT" in printed

    assert main(command.split()) == 2
    assert "holds a finished demo" in capsys.readouterr().err
    assert main([*command.split(), "--overwrite"]) == 0
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["rows"][2]["kl_nats"] == rows[2]["kl_nats"]
