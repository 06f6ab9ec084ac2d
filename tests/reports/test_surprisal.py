"""The page of a text in colour, by its content and in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.inference.score import Scores
from mogrifier_lm.launch.commands.score import main
from mogrifier_lm.reports.surprisal import surprisal_page
from tests.conftest import ROOT

RUN = ROOT / "tests/fixtures/v0/run"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
TEXT = (ROOT / "tests/fixtures/v0/text/test.txt").read_text()
LINES = ["</script><b>& «x»", "", *TEXT.splitlines()[:3]]


def scored(*, shift: float = 0.0) -> Scores:
    model = load_model(RUN)
    with torch.no_grad():
        model.output_bias[:5] += shift
    return model.score(LINES, top=2)


def data_of(page: str) -> dict[str, object]:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    data: dict[str, object] = json.loads(found)
    return data


def test_the_page_holds_every_word_of_both_models() -> None:
    a, b = scored(), scored(shift=2.0)
    data = data_of(surprisal_page({"A": a, "B": b}))
    words = [word for line in data["lines"] for word in line["words"]]  # type: ignore[attr-defined]
    assert [w["word"] for w in words] == [w.word for w in a]
    for entry, ours, theirs in zip(words, a, b, strict=True):
        assert entry["bits"] == pytest.approx([ours.surprisal, theirs.surprisal], abs=1e-4)
        assert entry["rank"] == [ours.rank, theirs.rank] and len(entry["guesses"][0]) == 2
    with pytest.raises(UserError, match="other words"):
        surprisal_page({"A": a, "B": load_model(RUN).score(LINES[1:])})


def dom(page: Path, script: str = "") -> str:
    """What a browser makes of the page, after a script has run in it."""
    if script:
        text = page.read_text().replace("</html>", f"<script>{script}</script></html>")
        page = page.with_name("driven.html")
        page.write_text(text)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*map(str, command), f"--user-data-dir={page.parent}/profile", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
def test_a_browser_shows_it_and_the_keyboard_moves(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(surprisal_page({"A": scored(), "B": scored(shift=2.0)}), encoding="utf-8")
    found = dom(page)
    words = re.findall(r'<span class="(?:unk)?" tabindex="[-0-9]+" style="background: rgb', found)
    assert len(words) == len(scored())
    assert "<b>&amp;" not in found and "&lt;/script&gt;&lt;b&gt;&amp;" in found
    assert re.findall(r'aria-pressed="(\w+)"', found) == ["false", "false", "true"]
    key = "document.dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    moved = dom(page, f"spans[0].focus(); {key % 'ArrowRight'}; {key % 'ArrowDown'}; "
                      f"{key % 'ArrowDown'}; byId('modes').firstChild.click()")  # fmt: skip
    (detail,) = re.findall(r'id="detail"[^>]*>(.*?)</div>', moved, re.S)
    first = [w for w in scored() if w.sentence == 3][0]
    assert f"«{first.word}»" in detail and f"A: {first.surprisal:.2f} bits" in detail
    assert re.findall(r'aria-pressed="(\w+)"', moved) == ["true", "false", "false"]


def test_the_command_writes_it(tmp_path: Path) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("\n".join(LINES))
    main(run=str(RUN), text=str(text), page=str(page))
    assert data_of(page.read_text(encoding="utf-8"))["models"] == [str(RUN)]
    with pytest.raises(UserError, match="is the run itself"):
        main(run=str(RUN), other=str(RUN), text=str(text), page=str(page))
