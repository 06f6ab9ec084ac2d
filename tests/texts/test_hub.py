"""PTB and WikiText-2 by way of `datasets`, its real client against a stand-in hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from mogrifier_lm.data import load_corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.options import DataConfig
from mogrifier_lm.texts.fetch import fetch
from tests.conftest import ROOT
from tests.hub_stand_in import HubStandIn

# As on the hub: PTB's script repository with its converted branch; WikiText's rows keep their
# leading blank and line break, and blank lines are rows.
LAYOUTS = {
    "ptb": ("ptb-text-only/ptb_text_only/refs_convert_parquet/penn_treebank/{}/0000.parquet",
            "sentence", ["the cat sat", "the <unk> sat on N mats"]),
    "wikitext2": ("Salesforce/wikitext/main/wikitext-2-v1/{}-00000-of-00001.parquet",
                  "text", ["", " = Title = \n", "", " the cat <unk> . \n"]),
}  # fmt: skip

LOAD = """
import json, sys
from mogrifier_lm.config import validate
from mogrifier_lm.data import load_corpus
from mogrifier_lm.texts.fetch import fetch
from tests.conftest import compose_config
config = validate(compose_config([f"data={sys.argv[1]}", f"data.cache_dir={sys.argv[2]}"]))
fetch(config.data)
corpus = load_corpus(config.data, config.tokenizer)
print(json.dumps([corpus.tokenizer.vocabulary[i] for i in corpus.splits["train"].ids]))
"""


@pytest.mark.parametrize("name", LAYOUTS)
def test_hub_rows_become_lines(name: str, tmp_path: Path) -> None:
    layout, column, rows = LAYOUTS[name]
    for split in ("train", "validation", "test"):
        path = tmp_path / "repos" / layout.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pa.parquet.write_table(pa.table({column: rows}), path)
    if name == "wikitext2":  # configurations are told in the card
        files = [
            {"split": s, "path": f"wikitext-2-v1/{s}-*"} for s in ("train", "validation", "test")
        ]
        card = {"configs": [{"config_name": "wikitext-2-v1", "data_files": files}]}
        readme = tmp_path / "repos/Salesforce/wikitext/main/README.md"
        readme.write_text(f"---\n{json.dumps(card)}\n---\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MOGRIFIER_"))}
    with HubStandIn(tmp_path / "repos") as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        arguments = [sys.executable, "-c", LOAD, name, str(tmp_path / "cache")]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [word for row in rows for word in [*row.split(), "<eos>"]]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    # The second time no hub is asked, and `datasets` is not needed.
    offline = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    again = subprocess.run(arguments, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1], again.stderr


def test_unreachable_hub_says_how_to_give_local_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOGRIFIER_LM_DATA", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = DataConfig(name="x", hub_path="nobody/nothing", cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match="cannot be had from the hub .*give data.dir=FOLDER"):
        fetch(source)
    with pytest.raises(UserError, match="data=x is not here yet: scripts/prepare_data.py"):
        load_corpus(source)
