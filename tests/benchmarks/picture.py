"""Takes a small picture of a page for docs/: of a report, or of TensorBoard where that runs.

    python -m gpt_lightning fit
    python tests/benchmarks/picture.py checkpoints/quickstart/report.html docs/report.png
    tensorboard --logdir checkpoints &
    python tests/benchmarks/picture.py http://localhost:6006 docs/tensorboard.png

It needs a Chromium.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = "--headless=new --no-sandbox --hide-scrollbars --virtual-time-budget=15000".split()
SCALE = 0.6  # of the picture, whose text stays readable


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("page", help="A file or an address.")
    parser.add_argument("output", type=Path, help="The PNG to write.")
    parser.add_argument("--height", type=int, default=1250, help="Of the part to show, in pixels.")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"there is none of {', '.join(BROWSERS)}; install one")
    page = arguments.page if "://" in arguments.page else Path(arguments.page).resolve(strict=True).as_uri()
    size = [f"--window-size=1280,{arguments.height}", f"--force-device-scale-factor={SCALE}"]
    picture = f"--screenshot={arguments.output.resolve()}"
    subprocess.run([browser, *OPTIONS, *size, picture, page], check=True)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
