"""What the stages need and no program of the repository makes: split lists by category, a tokenizer, the
config of a base.

    python recipes/prepare.py splits SNI FOLDER TRAIN TEST    # tasks to adapt to, at most; 0: all
    python recipes/prepare.py tokenizer TEXT PIECES MODEL     # MODEL/spiece.model, of lines of TEXT (or .xz)
    python recipes/prepare.py config MODEL PIECES D_MODEL D_KV D_FF LAYERS HEADS

`splits` writes FOLDER/tasks, a link, and FOLDER/splits/: instruct (a third of the training tasks, whole
categories), which the base is fine-tuned on, and adapt (tasks of the other categories, and the official test
tasks), which the methods are compared on."""

import json
import lzma
import random
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import sentencepiece

SENTINELS = 100  # ids behind the pieces, as in T5
LINES = 400_000  # of text that the tokenizer is trained on


def names(sni: Path, split: str) -> list[str]:
    listed = (sni / "splits/default" / f"{split}_tasks.txt").read_text(encoding="utf-8").split()
    return [name for name in listed if (sni / "tasks" / f"{name}.json").exists()]


def by_category(sni: Path, tasks: list[str], rng: random.Random) -> list[list[str]]:
    """The tasks of each category, all in random order."""
    groups = defaultdict(list)
    for name in rng.sample(tasks, len(tasks)):
        task = json.loads((sni / "tasks" / f"{name}.json").read_text(encoding="utf-8"))
        groups[task["Categories"][0]].append(name)
    return rng.sample(list(groups.values()), len(groups))


def in_turns(groups: list[list[str]], most: int) -> list[str]:
    """One task of each group, then a second one, up to `most` (0: all)."""
    turns = [name for i in range(max(map(len, groups))) for group in groups for name in group[i:i + 1]]
    return turns[:most or None]


def make_splits(sni: Path, folder: Path, train: int, test: int) -> None:
    rng, instruct = random.Random(0), []
    tasks = names(sni, "train")
    adapt = by_category(sni, tasks, rng)
    while len(instruct) < len(tasks) / 3:
        instruct += adapt.pop()
    lists = {"instruct": (instruct, []),
             "adapt": (in_turns(adapt, train), in_turns(by_category(sni, names(sni, "test"), rng), test))}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tasks").exists():
        (folder / "tasks").symlink_to((sni / "tasks").resolve())
    for name, pair in lists.items():
        (folder / "splits" / name).mkdir(parents=True, exist_ok=True)
        for split, chosen in zip(("train", "test"), pair, strict=True):
            path = folder / "splits" / name / f"{split}_tasks.txt"
            path.write_text("".join(f"{task}\n" for task in sorted(chosen)), encoding="utf-8")
        print(f"{name}: {len(pair[0])} training tasks, {len(pair[1])} test tasks")


def make_tokenizer(text: Path, pieces: int, model: Path) -> None:
    model.mkdir(parents=True, exist_ok=True)
    with (lzma.open if text.suffix == ".xz" else open)(text, "rt", encoding="utf-8") as lines:
        with open(model / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line[:2000] for line in islice(lines, LINES)), model_writer=file,
                vocab_size=pieces, model_type="unigram", character_coverage=0.9995, byte_fallback=False,
                pad_id=0, eos_id=1, unk_id=2, bos_id=-1, input_sentence_size=LINES, minloglevel=1)


def make_config(model: Path, pieces: int, d_model: int, d_kv: int, d_ff: int, layers: int,
                heads: int) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
              "vocab_size": pieces + SENTINELS, "d_model": d_model, "d_kv": d_kv, "d_ff": d_ff,
              "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads,
              "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False,
              "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "splits":
        make_splits(Path(rest[0]), Path(rest[1]), int(rest[2]), int(rest[3]))
    elif command == "tokenizer":
        make_tokenizer(Path(rest[0]), int(rest[1]), Path(rest[2]))
    elif command == "config":
        make_config(Path(rest[0]), *map(int, rest[1:]))
    else:
        sys.exit(__doc__)
