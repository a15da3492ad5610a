from pathlib import Path

import pytest
import yaml

from prox24_lightning.cli.main import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "prune").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_parser_takes_the_config_and_every_key_has_a_comment(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"] == yaml.safe_load(path.read_text())["data"]["class_path"]
    silent = [
        line
        for line in path.read_text().splitlines()
        if ":" in line and "#" not in line and not line.endswith(":") and "class_path" not in line
    ]
    assert not silent or all(key in line for line in silent for key in ("evaluation",))
