# %% [markdown]
# # A walk through mogrifier_lm
#
# Look at a trained model, score text with it, train two of one's own, compare them, sweep. It takes
# about a minute on two cores, offline: `python docs/walkthrough.py`, or as a notebook.
# (`python scripts/notebook.py` makes the notebook from the script.)

# %%
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "train.py").is_file()))
OUT = Path(tempfile.mkdtemp(prefix="walkthrough-"))


def run(command: str) -> str:
    """Run a command of the project as in a terminal; show what it says."""
    print("$", command)
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    done.check_returncode()
    return done.stdout


# %% [markdown]
# ## A trained model
#
# `models/wt2_small` is a Mogrifier LSTM of 5 million parameters, trained on WikiText-2.
# `load_model` takes it, or the folder of any run, and gives a `torch.nn.Module` in evaluation mode
# with its tokenizer.

# %%
from mogrifier_lm import load_model  # noqa: E402

lm = load_model("models/wt2_small")
print(lm.next_word("The film was released in the United", k=3))
print(lm.generate("The film was", max_words=20, temperature=0.8, seed=1)[0])

# %% [markdown]
# ## Score
#
# What each word costs, in bits, with the entropy of the distribution that predicts it and its rank
# there. Here a sentence and its shuffled words.

# %%
english = lm.score(["He was born in London , and died in the same year ."])
shuffled = lm.score(["year London in and . born was He died same in the , ."])
print(english.to_dataframe()[["word", "surprisal", "entropy", "rank", "count"]].to_string())
print("English ", english.totals)
print("shuffled", shuffled.totals)
assert english.totals.ppl < shuffled.totals.ppl / 5

# %% [markdown]
# Commands do the same to files, and draw. The page is one file that any browser shows.

# %%
text = OUT / "text.txt"
text.write_text("The river rises in the mountains .\nIt flows into the sea .\n")
run(f"python scripts/score.py run=models/wt2_small text={text} to={OUT}/scores.tsv")
run(f"python scripts/score.py run=models/wt2_small text={text} page={OUT}/page.html")

# %% [markdown]
# What the rounds of mogrification do to x and h, word by word: 0 leaves them as they are.

# %%
gates = lm.gates("The river rises in the mountains .")
print(gates.moved().round(1))  # layers, rounds, words

# %% [markdown]
# ## Train
#
# Two small models on the embedded synthetic language, whose true perplexity is known: an LSTM, and
# the same with two rounds. Anything is an override: `python train.py --help`.

# %%
SMALL = "model.hidden_size=48 trainer.max_epochs=null tracker=none"
for rounds in (0, 2):
    run(
        f"python train.py {SMALL} trainer.max_steps=300 model.rounds={rounds} "
        f"hydra.run.dir={OUT}/rounds_{rounds}"
    )

# %% [markdown]
# A run's folder holds all that is known of it, and is loaded as the model above.

# %%
own = load_model(OUT / "rounds_2")
print(own.generate(max_words=12, seed=1)[0])
print(sorted(path.name for path in (OUT / "rounds_2").iterdir()))

# %% [markdown]
# ## Compare
#
# A difference of two perplexities, sentence by sentence, with its interval. One seed each is no
# comparison of methods yet: for that there are sweeps.

# %%
run(f"python scripts/evaluate.py compare=[{OUT}/rounds_0,{OUT}/rounds_2] evaluators=[static]")

# %% [markdown]
# ## Sweep
#
# Every combination of the values, with a report of means and spreads over seeds.

# %%
run(
    f"python train.py -m {SMALL} trainer.max_steps=150 model.rounds=0,2 seed=1,2 "
    f"hydra.sweep.dir={OUT}/sweep"
)

# %%
from mogrifier_lm import read_sweep  # noqa: E402

frame = read_sweep(OUT / "sweep")
print(frame.to_string())
print("everything is in", OUT)
