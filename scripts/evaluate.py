"""Scores the best checkpoint of a run, or compares those of two runs on the same text.

python scripts/evaluate.py run=RUN_DIR evaluators=[static,dynamic,cache,mc_dropout]
python scripts/evaluate.py run=RUN_DIR evaluators=[dynamic] evaluators.dynamic.lr=[1e-4,3e-4]
python scripts/evaluate.py compare=[RUN_A,RUN_B]
python scripts/evaluate.py compare=[[A_SEED1,A_SEED2],[B_SEED1,B_SEED2]]

Evaluators: static, dynamic, cache, dynamic_cache, mc_dropout, rounds; their settings are in
mogrifier_lm/options.py. Those that are lists are tuned on the validation text, and test is scored
once. The run's summary.json takes the scores in; tuning.json holds every trial. What else may be
given: data.dir, data.cache_dir, trainer.device, trainer.threads, debug.
"""

import sys

from mogrifier_lm.launch.cli import evaluate

if __name__ == "__main__":
    if len(sys.argv) == 1 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    evaluate()
