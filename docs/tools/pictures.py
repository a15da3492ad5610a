"""Draw the pictures of README and guide anew: ``python -m docs.tools.pictures``.

It runs ``prox24 compare`` on the recipe of ``make demo``, takes the overview figure of its Prox24 run, and a screenshot
of TensorBoard by a headless chromium.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.image import imread, imsave

DOCS = Path(__file__).resolve().parents[1]
TAGS = "sparsity/(groups_24|retained_squared_norm|phase|mask_flips)|val_ppl|train_loss"
WIDTH_OF_SETTINGS = 250
"""Pixels at the right, where TensorBoard opens its settings."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Run the demo and draw; ``--runs`` takes the folder of an earlier ``prox24 compare``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="output folder of prox24 compare; it is run anew without this")
    runs = parser.parse_args().runs
    if runs is None:
        runs = Path("runs/pictures")
        command = ["compare", "--config", str(DOCS.parent / "configs" / "bytelm.yaml"), "--output", str(runs)]
        subprocess.run([sys.executable, "-m", "prox24_lightning.cli.main", *command], check=True)
    [figure] = sorted(runs.glob("prox24/**/sparsity.png"))
    shutil.copyfile(figure, DOCS / "demo.png")
    screenshot_tensorboard(runs, DOCS / "tensorboard.png")


def screenshot_tensorboard(runs: Path, picture: Path) -> None:
    """Serve ``runs`` on this machine, and save what a browser shows of it."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"install one of {', '.join(BROWSERS)} for the picture of TensorBoard")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port), "--host", "127.0.0.1"]
    )
    try:
        time.sleep(20)  # it reads the logs first
        address = f"http://127.0.0.1:{port}/?tagFilter={TAGS}&smoothing=0.0#timeseries"
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1800,1000"]
        # Without WebGL TensorBoard draws SVG, which a screenshot shows.
        shot = ["--disable-3d-apis", "--virtual-time-budget=30000", f"--screenshot={picture}", address]
        subprocess.run([browser, *options, *shot], check=True, capture_output=True)
        imsave(picture, imread(picture)[:, :-WIDTH_OF_SETTINGS])
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
