"""The options of the project: type, default, unit, range, what each does and its source.

The yaml files under configs/ hold values only; these dataclasses say which keys there are. The
settings of an evaluator are in its own file; `config.Config` holds all together.
"""

from dataclasses import dataclass

from mogrifier_lm.option import (
    AWD,
    COUNT,
    FACTOR,
    LAMB,
    MOGRIFIER,
    PARTS,
    RATE,
    REWIRED,
    SEED,
    SHARE,
    SIZE,
    Interval,
    option,
)

LONG_WORD = 20  # characters, on average, from which words are no unit


@dataclass(kw_only=True)
class Counts:
    """Published sizes of a corpus; tokens with one <eos> a line. A mismatch is warned of."""

    types: int | None = option(None, "vocabulary size with <eos>", COUNT)
    train: int | None = option(None, "training tokens", COUNT)
    valid: int | None = option(None, "validation tokens", COUNT)
    test: int | None = option(None, "test tokens", COUNT)


@dataclass(kw_only=True)
class DataConfig:
    name: str = option("synthetic", "a label for files and tables; `synthetic` is generated")
    dir: str | None = option(
        None,
        "folder with train.txt, valid.txt and test.txt (docs/data.md: other names), or one file "
        "that is cut into them; takes the place of the hub",
    )
    folder: str | None = option(None, "folder looked for below $MOGRIFIER_LM_DATA before the hub")
    hub_path: str | None = option(None, "name of the data set for `datasets.load_dataset`")
    hub_name: str | None = option(None, "its configuration")
    hub_revision: str | None = option(None, "its branch, tag or commit")
    hub_column: str = option("text", "its column that holds the lines")
    expected: Counts | None = option(None, "published counts, checked when the text is read")
    cache_dir: str | None = option(
        None, "token arrays are kept here; default ~/.cache/mogrifier_lm (or $XDG_CACHE_HOME)"
    )
    normalize: str = option(
        "none",
        "Unicode form of the text; clean: nfc, characters of no width and soft hyphens left out, "
        "other spaces made plain",
        ("none", "nfc", "nfkc", "clean"),
    )
    markers: str = option(
        "auto",
        "auto: a final <eos> on every line is its end, <s> and </s> are left out, UNK, <UNK>, "
        "[UNK], @@UNKNOWN@@ and <unknown> are <unk>; keep: they are words",
        ("auto", "keep"),
    )
    spelled: bool = option(
        False, "the text is spelled out, as PTB's: a space after each character, its own are _"
    )
    shares: list[float] = option(
        [0.9, 0.05, 0.05], "of train, valid and test in a single file, in this order", SHARE
    )
    seed: int = option(0, "of the synthetic language and its text", SEED)


@dataclass(kw_only=True)
class TokenizerConfig:
    name: str = option("word", "what a token is", ("word", "sentencepiece", "char", "byte"))
    model_type: str | None = option(
        None, "sentencepiece: how words are cut; default unigram", ("unigram", "bpe")
    )
    vocab_size: int | None = option(
        None, "sentencepiece: tokens; default 5000", Interval(260, SIZE.most)
    )
    min_count: int | None = option(
        None, "word, char: what is rarer in the training text is <unk>; default 1", COUNT
    )
    max_size: int | None = option(
        None,
        "word, char: types at most, <unk> and <eos> counted; what is rarer is <unk>",
        Interval(3, SIZE.most),
    )
    lowercase: bool = option(False, "the text is read in lower case")
    unk: str | None = option(None, "a word by which the text marks unknown ones, beside <unk>")
    vocabulary: str | None = option(
        None, "folder of a run whose tokenizer is taken, or (word) a file with a word a line"
    )


@dataclass(kw_only=True)
class ModelConfig:
    cell: str = option(
        "lstm",
        "the recurrence: a name in cells/spec.py",
        paper="arXiv 1909.01792; rlstm 2211.01848; mlstm 1609.07959",
    )
    rounds: int = option(
        5,
        "rounds of mogrification before each step; 0 is the plain cell",
        Interval(0, PARTS.most),
        MOGRIFIER,
    )
    rank: int | None = option(
        None, "inner size of the round matrices; null means full rank", SIZE, MOGRIFIER
    )
    share_rounds: bool = option(
        False, "one matrix for all odd rounds and one for all even rounds", paper="community code"
    )
    zigzag: bool = option(
        True, "false: every round is conditioned on the original x and h", paper=MOGRIFIER
    )
    round_bias: bool = option(
        True, "a bias in each round's gate (released code; not the paper)", paper=LAMB
    )
    cap_input_gate: bool = option(
        True, "input gate at most 1 - f, as in the published results", paper=LAMB
    )
    num_layers: int = option(2, "stacked recurrent layers", PARTS)
    hidden_size: int | None = option(None, "features of h; default 200 without num_params", SIZE)
    top_hidden_size: int | None = option(
        None,
        "features of the top layer's h; null: hidden_size (AWD-LSTM: embedding_size)",
        SIZE,
        AWD,
    )
    embedding_size: int | None = option(
        None, "features of the embedding; null: embedding_ratio * hidden_size", SIZE
    )
    embedding_ratio: float = option(
        1.0, "embedding size as a share of hidden_size", Interval(1e-3, 100), LAMB
    )
    num_params: float | None = option(
        None,
        "a budget of parameters: solves for hidden_size, which must then be null",
        Interval(1, 1e15),
        LAMB,
    )
    tie_embeddings: bool = option(
        True, "the output layer uses the embedding matrix", paper="arXiv 1608.05859"
    )
    skip_sum: bool = option(
        False, "the encoder's output is the sum of its layers' outputs (LAMB)", paper=LAMB
    )
    residual: bool = option(
        False,
        "each layer's input is added to its output; embedding_size = hidden_size",
        paper=REWIRED,
    )
    adaptive_softmax: list[int] = option(
        [],
        "first ids of clusters of rare types, with vectors and a softmax of their own, 4, 16, ... "
        "times shorter; [] is one softmax",
        SIZE,
        "arXiv 1609.04309, 1809.10853",
    )
    mixture: int = option(
        1, "softmaxes that are mixed (MoS); 1 is the plain softmax", PARTS, "arXiv 1711.03953"
    )
    init: str = option(
        "uniform",
        "of the cells: torch.nn.LSTM's, or LAMB's truncated normals",
        ("uniform", "melis2020"),
        LAMB,
    )
    chrono_t_max: float | None = option(
        None,
        "Chrono init: forget biases ln U(1, t_max - 1), input biases their negative",
        Interval(2, 1e6),
        "arXiv 1804.11188",
    )
    unigram_bias: bool = option(
        True, "the output bias starts at the log frequencies of the training text, not at 0"
    )
    backend: str = option(
        "auto", "kernels: auto, or one that benchmark.py lists; reference: the output layer's too"
    )


@dataclass(kw_only=True)
class RegularizationConfig:
    embedding_dropout: float = option(
        0.0, "rate on whole words of the embedding, per window (AWD-LSTM)", RATE, AWD
    )
    input_dropout: float = option(0.0, "rate on the embedding's output", RATE, AWD)
    inter_layer_dropout: float = option(0.0, "rate between layers", RATE, AWD)
    state_dropout: float = option(
        0.0, "rate on the h that enters a step; one mask per window", RATE, "arXiv 1512.05287"
    )
    output_dropout: float = option(0.0, "rate on the encoder's output", RATE, AWD)
    weight_dropout: float = option(
        0.0, "DropConnect rate on weight_hh, one mask per window (AWD-LSTM)", RATE, AWD
    )
    per_step: bool = option(
        False,
        "input, inter-layer and output masks drawn per time step, not one per window",
        paper=LAMB,
    )
    samples: int = option(
        1,
        "dropout samples per target, of whose probabilities the mean is trained (arXiv 2211.01848)",
        PARTS,
        REWIRED,
    )
    l2: float = option(
        0.0,
        "times half the sum of squared weights, in the loss and so inside the clipped gradient "
        "(LAMB), in the unit of trainer.loss_per",
        FACTOR,
        LAMB,
    )
    ar: float = option(
        0.0, "AWD-LSTM's alpha: times the mean square of the dropped encoder output", FACTOR, AWD
    )
    tar: float = option(
        0.0, "AWD-LSTM's beta: times the mean square of its change over a step", FACTOR, AWD
    )
    reset_state: float = option(
        0.0, "probability, per stream and window, that the carried state is zeroed", RATE, LAMB
    )


@dataclass(kw_only=True)
class OptimizerConfig:
    name: str = option(
        "adam",
        "the rule",
        ("sgd", "adam", "adamw", "radam"),
        "adam 1412.6980; adamw 1711.05101; radam 1908.03265",
    )
    lr: float = option(
        0.002, "learning rate, on the loss that trainer.loss_per says", Interval(above=0, most=1e4)
    )
    beta1: float = option(0.9, "not sgd: decay of the gradient's mean", RATE)
    beta2: float = option(0.999, "not sgd: decay of the squared gradient's mean", RATE)
    eps: float = option(1e-8, "not sgd: added to the root of the mean square", SHARE)
    weight_decay: float = option(
        0.0,
        "added to the gradient after clipping, times the weights; adamw: decoupled from it",
        FACTOR,
    )
    averaging: str = option(
        "none",
        "of the weights; validation, results and checkpoints/best use the average, training goes "
        "on with the raw weights",
        ("none", "nt_asgd", "tail", "ema", "two_tailed"),
        "nt_asgd 1708.02182; tail LAMB; two_tailed 2209.12581",
    )
    averaging_patience: int = option(
        5,
        "nt_asgd: n of its trigger; tail: validations without improvement before it begins; "
        "two_tailed: validations without improvement that count as stagnation",
        COUNT,
    )
    averaging_start: float = option(
        0.8, "tail: begins at this share of the training at the latest; 0: at once", Interval(0, 1)
    )
    averaging_decay: float = option(0.999, "ema: decay per step", Interval(above=0, below=1))


@dataclass(kw_only=True)
class TrainerConfig:
    batch_size: int = option(20, "streams", SIZE)
    accumulation_steps: int = option(
        1,
        "gradient accumulation steps: so many parts of the streams in turn, to the same result",
        PARTS,
    )
    bptt: int = option(35, "window of truncated backpropagation, time steps", SIZE)
    max_epochs: int | None = option(None, "stop after so many passes over the text", COUNT)
    max_steps: int | None = option(None, "stop after so many windows", COUNT)
    max_minutes: float | None = option(
        None, "stop training after so many minutes", Interval(above=0, most=1e9)
    )
    variable_bptt: bool = option(
        False,
        "window lengths drawn from N(bptt, 5), one in twenty from N(bptt / 2, 5), the learning "
        "rate scaled by length / bptt (AWD-LSTM)",
        paper=AWD,
    )
    streams: str = option(
        "columns",
        "columns of the text, state zeroed after each pass (AWD-LSTM), or read_heads that each "
        "walk the whole text without end (LAMB)",
        ("columns", "read_heads"),
        "AWD, LAMB",
    )
    loss_per: str = option(
        "token",
        "unit of the loss that clip, l2, ar and tar are added to or measured in: mean nats per "
        "token, or (LAMB) nats summed over the window's steps, mean over streams",
        ("token", "window"),
        LAMB,
    )
    clip: float | None = option(
        0.25,
        "largest norm of the gradient of the loss, in its unit; null: none",
        Interval(above=0, most=1e9),
    )
    init_from: str | None = option(
        None, "folder of a run whose best (averaged) weights training starts from: fine-tuning"
    )
    precision: str = option(
        "fp32", "dtype of the matrix products; weights and state stay fp32", ("fp32", "bf16")
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto: a GPU where there is one")
    threads: int | None = option(None, "CPU threads; null: torch's choice", Interval(1, 1024))
    valid_every: int | None = option(None, "steps between validations; null: each epoch", COUNT)
    valid_batch_size: int = option(
        20, "streams of the validations while training (results are scored by `evaluators`)", SIZE
    )
    warmup_steps: int = option(0, "steps in which the rate rises to its full", Interval(0, 1e12))
    lr_decay: str = option(
        "none",
        "linear or half a cosine: the rate falls to 0 where max_steps or max_epochs ends",
        ("none", "linear", "cosine"),
        paper="cosine 1608.03983",
    )
    lr_drop: float = option(
        1.0, "factor on the learning rate when validation has not improved", SHARE
    )
    lr_on_divergence: float | None = option(
        None,
        "where the loss is not finite or validation perplexity twice the best: go back to the "
        "best weights with the learning rate times this; null: an error and no look, respectively",
        SHARE,
        REWIRED,
    )
    lr_patience: int = option(
        0, "validations without improvement that are waited for", Interval(0, COUNT.most)
    )
    early_stop: int | None = option(
        None, "stop after so many validations without improvement", COUNT
    )
    log_every: int = option(50, "steps between lines of metrics.jsonl", COUNT)
    checkpoint_minutes: float = option(
        5.0,
        "longest time between checkpoints; one is written at each validation too",
        Interval(0, 1e9),
    )
    keep_last: int = option(1, "of so many last validations checkpoints stay, to go back to", COUNT)
    keep_best: int = option(1, "of so many validations, the best, weights stay", COUNT)


@dataclass(kw_only=True)
class TrackerConfig:
    name: str = option("wandb", "where curves are sent beside the run's files", ("wandb", "none"))
    mode: str = option(
        "auto",
        "auto is online where an account is configured, offline elsewhere",
        ("auto", "online", "offline", "disabled"),
    )
    project: str = option("mogrifier_lm", "W&B project")
    entity: str | None = option(None, "W&B account or team; null: the account's default")
    group: str | None = option(None, "W&B group; null: the sweep's folder in a multirun")
    run_name: str | None = option(None, "W&B display name; null: made of the overrides")
    tags: list[str] = option(
        [], "W&B tags beside the names of the experiment, the data and the cell"
    )
    samples: int = option(0, "texts sampled at each validation, as a table", Interval(0, 100))
    artifacts: bool = option(
        False, "upload the best checkpoint as a W&B artifact, and wait for it, 1 s a megabyte"
    )


@dataclass(kw_only=True)
class ReportConfig:
    formats: list[str] = option([], "of plots, beside png", ("pdf", "svg"))
