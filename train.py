"""Trains a language model, scores it and leaves its files in runs/<date>/<time>/.

python train.py                                      a Mogrifier LSTM on a synthetic language
python train.py data=ptb model.rounds=5 model.hidden_size=650
python train.py experiment=ptb_small                 a recipe, with its expected number
python train.py -m model.rounds=0,1,2 seed=1,2       a sweep
python train.py resume=runs/2026-01-31/12-00-00      goes on exactly where a run stopped
python train.py --help                               groups and keys
"""

from mogrifier_lm.launch.cli import train

if __name__ == "__main__":
    train()
