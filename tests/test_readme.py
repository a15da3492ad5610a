"""The README's first block runs as it stands, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_quickstart_runs(tmp_path):
    [block, *_] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob("benchmark.json")), "the final hook has written its report"


def test_every_file_the_readme_points_at_exists():
    text = README.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
    results = README.parent / "benchmarks" / "results"
    cited = re.findall(r"`(?:benchmarks/results/)?([a-z0-9_]+/\d{4}-\d\d-\d\d[^`]*)`", text)
    assert len(cited) > 20
    for target in cited:
        assert (results / target).exists(), target
