"""Pages are photographed without naming the machine; a script stands for the browser."""

import sys
from pathlib import Path

from PIL import Image

from benchmarks.front import SCREENSHOTS, photograph

ROOT = Path(__file__).resolve().parents[2]
BROWSER = f"""#!{sys.executable}
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
from PIL import Image
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:-1])
page = Path(unquote(urlsplit(sys.argv[-1]).path)).read_text()
assert "graphs/here" in page and {str(ROOT)!r} not in page
size = tuple(map(int, flags["--window-size"].split(",")))
dark = flags["--blink-settings"] == "preferredColorScheme=0"
Image.new("RGB", size, "black" if dark else "white").save(flags["--screenshot"])
"""


def test_pages_are_photographed_at_their_sizes_and_themes(tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(BROWSER)
    browser.chmod(0o755)
    for name in {shot.page for shot in SCREENSHOTS}:
        (tmp_path / name).write_text(f"<p>from {ROOT}/graphs/here</p>")
    (folder := tmp_path / "pictures").mkdir()
    written = photograph(tmp_path, str(browser), folder)
    assert [path.name for path in written] == [f"{shot.name}.png" for shot in SCREENSHOTS]
    for shot, path in zip(SCREENSHOTS, written, strict=True):
        picture = Image.open(path).convert("L")
        assert picture.size == (shot.width, shot.height)
        assert picture.getextrema() == ((0, 0) if shot.dark else (255, 255))
